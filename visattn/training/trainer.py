"""What is attached to a training: loggers, reports, stops and checkpoints, chosen by plain keys."""

from datetime import timedelta
from pathlib import Path

from lightning.pytorch.callbacks import (
    Callback,
    EarlyStopping,
    LearningRateMonitor,
    ModelCheckpoint,
)
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.loggers import TensorBoardLogger

from visattn.training.callbacks.freezing import Freeze
from visattn.training.callbacks.progress_bar import Bar
from visattn.training.callbacks.speed import Speed
from visattn.training.callbacks.stopping import BetweenSteps, StopOnNotFinite, StopOnSignal
from visattn.training.callbacks.weight_average import AverageWeights
from visattn.training.module import ImageClassifier
from visattn.training.reports.attention_overlays import AttentionOverlays
from visattn.training.reports.run_report import RunReport
from visattn.training.run_folder import RunLogger


def loggers(folder: Path, resumed_step: int | None) -> list:
    """Return what writes metrics.csv and what TensorBoard reads."""
    return [RunLogger(folder, resumed_step), TensorBoardLogger(folder, "tensorboard", version="")]


def given_loggers(asked) -> list:
    """Return the loggers that ``trainer.logger`` names, such as that of W&B, beside the two above."""
    return [] if isinstance(asked, bool | None) else asked if isinstance(asked, list) else [asked]


def callbacks(
    config, folder: Path, module: ImageClassifier, resumed: bool = False
) -> list[Callback]:
    """Return what the plain keys of a training ask for, and what every training has."""
    checkpoints = (folder / "checkpoints").absolute()
    # with sharded parameters no process holds a network that it could look at alone
    drawn = config.overlays and config.trainer.strategy != "fsdp"
    chosen = [AttentionOverlays(folder / "attention", config.overlays)] if drawn else []
    if module.recipe.ema:  # behind what looks at the validated network, before what saves it
        chosen.append(AverageWeights(module.recipe.ema))
    if module.frozen:
        chosen.append(Freeze(module.frozen, module.recipe.unfreeze_epoch))
    chosen += [
        RunReport(folder, resumed),
        Speed(),
        StopOnNotFinite(),
        StopOnSignal(checkpoints / "last.ckpt"),
    ]
    if config.trainer.logger is not False:
        chosen.append(LearningRateMonitor())
    if config.trainer.enable_progress_bar is not False:
        chosen.append(Bar())
    if config.patience:
        chosen.append(EarlyStopping(module.monitor, mode="max", patience=config.patience))
    return chosen + _savers(config, checkpoints, module.monitor)


class SavedConfig(SaveConfigCallback):
    """Save config.yaml without the checkpoint that a run went on from: a new run of it starts anew."""

    def __init__(self, parser, config, **options):
        super().__init__(parser, config.clone(), **options)
        self.config.ckpt_path = None


def _savers(config, checkpoints: Path, monitor: str) -> list[ModelCheckpoint]:
    place = {"dirpath": checkpoints, "enable_version_counter": False}
    savers = [
        ModelCheckpoint(filename="best", monitor=monitor, mode="max", **place),
        ModelCheckpoint(filename="last", every_n_epochs=1, **place),
    ]
    if config.checkpoint_steps:
        savers.append(
            BetweenSteps(filename="last", every_n_train_steps=config.checkpoint_steps, **place)
        )
    if config.checkpoint_minutes:
        interval = timedelta(minutes=config.checkpoint_minutes)
        savers.append(BetweenSteps(filename="last", train_time_interval=interval, **place))
    return savers
