"""PredictionWriter: the predictions of a classifier for a folder of images, as a table."""

import csv
from pathlib import Path
from typing import Any

from lightning.pytorch.callbacks import BasePredictionWriter

from visattn.training.checkpoint_io import KEY


class PredictionWriter(BasePredictionWriter):
    """While predicting write one line per image: file, most likely class and its probability.

    Args:
        folder: Where predictions.csv goes; with several processes each writes its own
            predictions.RANK.csv.
    """

    def __init__(self, folder: Path):
        super().__init__(write_interval="batch")
        self.folder = folder
        self.path = folder / "predictions.csv"
        self.classes: list[str] = []
        self.count = 0

    def on_load_checkpoint(
        self,
        trainer,
        pl_module,
        checkpoint: dict[str, Any],
    ) -> None:
        self.classes = checkpoint[KEY]["classes"]

    def on_predict_start(self, trainer, pl_module) -> None:
        if trainer.world_size > 1:
            self.path = self.folder / f"predictions.{trainer.global_rank}.csv"
        self.folder.mkdir(parents=True, exist_ok=True)
        # a file's name need not be text: its bytes stay what they are
        self.file = self.path.open("w", newline="", encoding="utf-8", errors="surrogateescape")
        self.writer = csv.writer(self.file)
        self.writer.writerow(("file", "class", "probability"))

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
        names, probabilities = prediction  # B file names and (B, C)
        values, winners = probabilities.max(1)
        for row, name in enumerate(names):
            class_name = self.classes[int(winners[row])]
            self.writer.writerow((name, class_name, f"{float(values[row]):.6f}"))
        self.count += len(names)

    def teardown(self, trainer, pl_module, stage: str) -> None:
        if hasattr(self, "file"):  # prediction may fail before it starts
            self.file.close()
