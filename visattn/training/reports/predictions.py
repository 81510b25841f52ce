"""PredictionWriter: what a classifier says about a folder of images, as a table."""

import csv
from pathlib import Path

from lightning.pytorch.callbacks import BasePredictionWriter

from visattn.training.checkpoint_io import KEY


class PredictionWriter(BasePredictionWriter):
    """Write one line per image while predicting: its file, its most likely class and that class's probability.

    Args:
        folder: Where predictions.csv goes; with several processes each writes its own
            predictions.RANK.csv.
    """

    def __init__(self, folder: Path):
        super().__init__(write_interval="batch")
        self.folder = folder
        self.classes: list[str] = []
        self.count = 0

    def on_load_checkpoint(self, trainer, pl_module, checkpoint: dict) -> None:
        self.classes = checkpoint[KEY]["classes"]

    def on_predict_start(self, trainer, pl_module) -> None:
        part = f".{trainer.global_rank}" if trainer.world_size > 1 else ""
        self.path = self.folder / f"predictions{part}.csv"
        self.folder.mkdir(parents=True, exist_ok=True)
        # a file's name need not be text: its bytes stay what they are
        self.file = self.path.open("w", newline="", encoding="utf-8", errors="surrogateescape")
        self.rows = csv.writer(self.file)
        self.rows.writerow(("file", "class", "probability"))

    def write_on_batch_end(
        self,
        trainer,
        pl_module,
        prediction,
        batch_indices,
        batch,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        names, probabilities = prediction
        values, winners = probabilities.max(1)
        for name, value, winner in zip(names, values.tolist(), winners.tolist(), strict=True):
            self.rows.writerow((name, self.classes[winner], f"{value:.6f}"))
        self.count += len(names)

    def teardown(self, trainer, pl_module, stage: str) -> None:
        if hasattr(self, "file"):
            self.file.close()
