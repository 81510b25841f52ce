"""What is attached to a training: loggers, reports, stops and checkpoints, chosen by plain keys."""

from datetime import timedelta
from pathlib import Path

from lightning.pytorch.callbacks import Callback, EarlyStopping, LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger

from visattn.training.attention import AttentionOverlays
from visattn.training.average import AverageWeights
from visattn.training.module import Recipe
from visattn.training.run import Bar, Report, RunLogger, Speed
from visattn.training.stopping import StopOnNotFinite, StopOnSignal


def loggers(folder: Path, resumed_step: int | None) -> list:
    """Return what writes metrics.csv and what TensorBoard reads."""
    return [RunLogger(folder, resumed_step), TensorBoardLogger(folder, "tensorboard", version="")]


def callbacks(config, folder: Path, recipe: Recipe) -> list[Callback]:
    """Return what the plain keys of a training ask for, and what every training has."""
    checkpoints = (folder / "checkpoints").absolute()
    resumed = bool(config.ckpt_path) and Path(config.ckpt_path).absolute().parent == checkpoints
    chosen = [AttentionOverlays(folder / "attention", config.overlays)] if config.overlays else []
    if recipe.ema:  # behind what looks at the validated network, before what saves it
        chosen.append(AverageWeights(recipe.ema))
    chosen += [Report(folder, resumed), Speed(), StopOnNotFinite(), StopOnSignal(checkpoints / "last.ckpt")]
    if config.trainer.logger is not False:
        chosen.append(LearningRateMonitor())
    if config.trainer.enable_progress_bar is not False:
        chosen.append(Bar())
    if config.patience:
        chosen.append(EarlyStopping("val_accuracy", mode="max", patience=config.patience))
    return chosen + _savers(config, checkpoints)


def _savers(config, checkpoints: Path) -> list[ModelCheckpoint]:
    place = {"dirpath": checkpoints, "enable_version_counter": False}
    savers = [
        ModelCheckpoint(filename="best", monitor="val_accuracy", mode="max", **place),
        ModelCheckpoint(filename="last", every_n_epochs=1, **place),
    ]
    if config.checkpoint_steps:
        savers.append(ModelCheckpoint(filename="last", every_n_train_steps=config.checkpoint_steps, **place))
    if config.checkpoint_minutes:
        interval = timedelta(minutes=config.checkpoint_minutes)
        savers.append(ModelCheckpoint(filename="last", train_time_interval=interval, **place))
    return savers
