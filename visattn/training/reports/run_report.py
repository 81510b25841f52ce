"""RunReport: curves, confusion matrix, table of classes and result.json of a training."""

import json
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_only

from visattn.training.callbacks.speed import Speed
from visattn.training.measures import write_classes
from visattn.training.module import ImageClassifier
from visattn.training.reports.plots import draw_confusion, draw_curves
from visattn.training.run_folder import read_metrics


class RunReport(Callback):
    """Write curves.png, confusion.png, classes.csv and result.json; remember the best epoch.

    Args:
        folder: The run's folder.
        resumed: Training resumes from a checkpoint in this very folder, so the best epoch so far is
            there too.
    """

    def __init__(self, folder: Path, resumed: bool = False):
        self.folder = folder
        self.resumed = resumed
        self.speed = Speed()
        self.best: dict[str, Any] = {}
        self.earlier_seconds = 0.0  # before the resume
        self.start_time: float | None = None

    @property
    def state_key(self) -> str:
        return "Report"  # part of the format of checkpoints

    @property
    def best_metrics(self) -> dict[str, float]:
        """The validation's numbers in the best epoch."""
        return {key: value for key, value in self.best.items() if key.startswith("val_")}

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best, "seconds": self._elapsed_seconds()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if self.resumed:
            self.best = state_dict["best"]
            self.earlier_seconds = state_dict["seconds"]

    def on_load_checkpoint(
        self,
        trainer,
        pl_module,
        checkpoint: dict[str, Any],
    ) -> None:
        if not self.resumed:
            return
        for state in checkpoint["callbacks"].values():
            if "dirpath" in state:
                _move_checkpoint_state(state, (self.folder / "checkpoints").absolute())

    def on_train_start(self, trainer, pl_module) -> None:
        self.start_time = time.perf_counter()

    def on_validation_end(self, trainer, pl_module) -> None:
        metrics = _validation_metrics(trainer)
        score = metrics.get(pl_module.monitor, -1.0)
        best_score = self.best.get(pl_module.monitor, -1.0)
        if trainer.sanity_checking or score <= best_score:
            return
        self.best = {**metrics, "epoch": trainer.current_epoch}
        if pl_module.matrix is not None:
            self.best["confusion"] = pl_module.matrix.cpu()

    @rank_zero_only
    def on_fit_end(self, trainer, pl_module) -> None:
        if self.start_time is None:  # the run was complete before: its files are right
            return
        classes = trainer.datamodule.classes
        if "confusion" in self.best:
            matrix = torch.as_tensor(self.best["confusion"])  # older checkpoints hold lists
            draw_confusion(matrix, classes, self.folder / "confusion.png")
            write_classes(matrix, classes, self.folder / "classes.csv")
        for logger in trainer.loggers:
            logger.save()
        rows = read_metrics(self.folder / "metrics.csv")
        if rows:
            draw_curves(rows, self.folder / "curves.png")
        text = json.dumps(self.result(trainer, pl_module), indent=2)
        (self.folder / "result.json").write_text(f"{text}\n")

    def result(
        self,
        trainer: pl.Trainer,
        module: ImageClassifier,
    ) -> dict[str, Any]:
        """Return the content of result.json."""
        return {
            **self.best_metrics,
            "best_epoch": self.best.get("epoch"),
            "last": _validation_metrics(trainer),
            "epochs": trainer.current_epoch,
            "steps": trainer.global_step,
            "seconds": round(self._elapsed_seconds(), 1),
            **self.speed.facts(trainer, module),
            "parameters": sum(parameter.numel() for parameter in module.model.parameters()),
            "network": module.network,
            "classes": list(module.data.classes),
            "seed": module.seed,
        }

    def _elapsed_seconds(self) -> float:
        if self.start_time is None:
            return self.earlier_seconds
        return self.earlier_seconds + time.perf_counter() - self.start_time


def _validation_metrics(trainer: pl.Trainer) -> dict[str, float]:
    metrics = {}
    for key, value in trainer.callback_metrics.items():
        if key.startswith("val_"):
            metrics[key] = float(value)
    return metrics


def _move_checkpoint_state(state: dict[str, Any], folder: Path) -> None:
    """Point the state of a ModelCheckpoint to the folder where its checkpoints are now.

    Lightning forgets the best score when a run's folder was moved, and would overwrite the best
    checkpoint.
    """
    path = str(folder / Path(state["best_model_path"]).name)
    score = state["best_model_score"]
    state["dirpath"] = str(folder)
    state["best_model_path"] = path
    state["kth_best_model_path"] = path
    state["best_k_models"] = {}
    if score is not None:
        state["best_k_models"][path] = score
