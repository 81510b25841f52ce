"""RunReport: curves, confusion matrix, table of classes and result.json of a training."""

import json
import os
import time
from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_only

from visattn.training.callbacks.speed import Speed
from visattn.training.measures import write_classes
from visattn.training.reports.plots import draw_confusion, draw_curves
from visattn.training.run_folder import read_metrics


class RunReport(Callback):
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
            draw_curves(
                read_metrics(self.folder / "metrics.csv", 10**12), self.folder / "curves.png"
            )
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
