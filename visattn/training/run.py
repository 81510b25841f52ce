"""The folder of a run: where it lies, what is kept of an earlier one, and how its training went."""

import csv
import errno
import json
import os
import tempfile
import time
from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities import rank_zero_only

from visattn.training.measures import write_classes
from visattn.training.plots import draw_confusion, draw_curves
from visattn.training.speed import Speed


def claim(folder: Path, resumed: bool) -> str:
    """Make the folder of a run writable before any work is done; an earlier run there steps aside. Return a notice."""
    notice = ""
    if not resumed and any((folder / "checkpoints").glob("*.ckpt")):
        number = next(
            i for i in range(1, 10**6) if not folder.with_name(f"{folder.name}.{i}").exists()
        )
        notice = f"{folder} held an earlier run, now {folder.rename(folder.with_name(f'{folder.name}.{number}'))}"
    try:
        (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        reason = os.strerror(error.errno or errno.EIO)
        raise OSError(
            f"cannot write the run to {folder}: {reason}; name another folder with --out"
        ) from error
    return notice


class RunLogger(CSVLogger):
    """Write metrics.csv into the run's folder; after a resume the rows up to the resumed step stay.

    Args:
        folder: The run's folder.
        resumed_step: Step of the checkpoint that training goes on from, or None for a new run.
    """

    def __init__(self, folder: Path, resumed_step: int | None = None):
        super().__init__(folder, name="", version="", flush_logs_every_n_steps=50)
        self._kept = _rows(folder / "metrics.csv", resumed_step) if resumed_step is not None else []

    @property
    def experiment(self):
        writer = super().experiment
        if self._kept and rank_zero_only.rank == 0:
            writer.metrics.extend(self._kept)
            self._kept = []
        return writer


def _rows(path: Path, last_step: int) -> list[dict]:
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        rows = [
            {key: float(value) for key, value in row.items() if value}
            for row in csv.DictReader(file)
        ]
    return [{**row, "step": int(row["step"])} for row in rows if row.get("step", 0) < last_step]


class Report(Callback):
    """Write curves.png, confusion.png, classes.csv and result.json, and keep the numbers of the best epoch.

    Args:
        folder: The run's folder.
        resumed: Training goes on from a checkpoint of this very folder, so the best epoch so far is
            there too.
    """

    def __init__(self, folder: Path, resumed: bool = False):
        self.folder = folder
        self.resumed = resumed
        self.best = {}
        self.seconds = 0.0

    def state_dict(self) -> dict:
        return {"best": self.best, "seconds": self._elapsed()}

    def load_state_dict(self, state: dict) -> None:
        if self.resumed:
            self.best, self.seconds = state["best"], state["seconds"]

    def on_load_checkpoint(self, trainer, pl_module, checkpoint: dict) -> None:
        # Lightning forgets the best score when a run's folder was moved, and would write over the
        # best checkpoint.
        here = str((self.folder / "checkpoints").absolute())
        for state in checkpoint["callbacks"].values():
            if self.resumed and "dirpath" in state:
                path = os.path.join(here, os.path.basename(state["best_model_path"]))
                state |= {"dirpath": here, "best_model_path": path, "kth_best_model_path": path}
                state["best_k_models"] = (
                    {path: score} if (score := state["best_model_score"]) is not None else {}
                )

    def on_train_start(self, trainer, pl_module) -> None:
        self.start = time.perf_counter()

    def on_validation_end(self, trainer, pl_module) -> None:
        found = {
            key: float(value)
            for key, value in trainer.callback_metrics.items()
            if key.startswith("val_")
        }
        score = found.get(pl_module.monitor, -1.0)
        if trainer.sanity_checking or score <= self.best.get(pl_module.monitor, -1.0):
            return
        self.best = {**found, "epoch": trainer.current_epoch}
        if pl_module.matrix is not None:
            self.best["confusion"] = pl_module.matrix.cpu()

    @rank_zero_only
    def on_fit_end(self, trainer, pl_module) -> None:
        if not hasattr(
            self, "start"
        ):  # the run was complete before: what was written then is right
            return
        classes = trainer.datamodule.classes
        if "confusion" in self.best:
            matrix = torch.as_tensor(self.best["confusion"])  # older checkpoints hold lists
            draw_confusion(matrix, classes, self.folder / "confusion.png")
            write_classes(matrix, classes, self.folder / "classes.csv")
        for logger in trainer.loggers:
            logger.save()
        if (self.folder / "metrics.csv").is_file():
            draw_curves(_rows(self.folder / "metrics.csv", 10**12), self.folder / "curves.png")
        (self.folder / "result.json").write_text(
            json.dumps(self.result(trainer, pl_module), indent=2) + "\n"
        )

    def result(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict:
        """Return what result.json holds."""
        last = {
            key: float(value)
            for key, value in trainer.callback_metrics.items()
            if key.startswith("val_")
        }
        speed = next(part for part in trainer.callbacks if isinstance(part, Speed))
        return {
            **{key: value for key, value in self.best.items() if key.startswith("val_")},
            "best_epoch": self.best.get("epoch"),
            "last": last,
            "epochs": trainer.current_epoch,
            "steps": trainer.global_step,
            "seconds": round(self._elapsed(), 1),
            **speed.facts(trainer, pl_module),
            "parameters": sum(parameter.numel() for parameter in pl_module.model.parameters()),
            "network": pl_module.network,
            "classes": list(trainer.datamodule.classes),
            "seed": pl_module.seed,
        }

    def _elapsed(self) -> float:
        return self.seconds + (time.perf_counter() - self.start if hasattr(self, "start") else 0.0)
