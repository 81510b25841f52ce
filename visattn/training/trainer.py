"""Build Lightning's Trainer: loggers, callbacks and checkpoints, chosen by flat keys."""

from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from jsonargparse import Namespace
from lightning.pytorch.callbacks import (
    Callback,
    EarlyStopping,
    LearningRateMonitor,
    ModelCheckpoint,
)
from lightning.pytorch.loggers import Logger, TensorBoardLogger

from visattn.training.callbacks.freezing import Freeze
from visattn.training.callbacks.progress_bar import Bar
from visattn.training.callbacks.stopping import BetweenSteps, StopOnNotFinite, StopOnSignal
from visattn.training.callbacks.weight_average import AverageWeights
from visattn.training.checkpoint_io import AtomicCheckpointIO
from visattn.training.module import ImageClassifier
from visattn.training.parser import command_parser
from visattn.training.reports.attention_overlays import AttentionOverlays
from visattn.training.reports.run_report import RunReport
from visattn.training.run_folder import RunLogger
from visattn.training.sharded_parameters import sharding_strategy


def build_trainer(
    command: str,
    config: Namespace,
    folder: Path,
    module: ImageClassifier,
    callbacks: list[Callback],
    loggers: list[Logger],
) -> pl.Trainer:
    """Build the Trainer of a command: what ``config.trainer`` asks for, and what every run has."""
    # loggers, callbacks, plugins and strategies that the keys name by class
    arguments = command_parser(command).instantiate_classes(config).trainer.as_dict()
    arguments["callbacks"] = [*_as_list(arguments["callbacks"]), *callbacks]
    if config.trainer.logger is not False:
        arguments["logger"] = [*loggers, *_as_list(arguments["logger"])] or False
    if config.trainer.strategy == "fsdp":
        channels_last = module.memory_format is torch.channels_last
        arguments["strategy"] = sharding_strategy(module.recipe, channels_last)
    arguments["default_root_dir"] = str(folder)
    arguments["enable_checkpointing"] = command == "fit"
    arguments["plugins"] = AtomicCheckpointIO()
    trainer = pl.Trainer(**arguments)
    if config.trainer.sync_batchnorm and trainer.strategy.root_device.type == "cpu":
        raise ValueError("trainer.sync_batchnorm needs GPUs: torch has no such layer for the CPU")
    return trainer


def fit_loggers(folder: Path, resumed_step: int | None = None) -> list[Logger]:
    """Return what writes metrics.csv and what TensorBoard reads."""
    return [RunLogger(folder, resumed_step), TensorBoardLogger(folder, "tensorboard", version="")]


def fit_callbacks(
    config: Namespace,
    module: ImageClassifier,
    report: RunReport,
) -> list[Callback]:
    """Return the callbacks of a training, in the order in which they must be called."""
    folder = report.folder
    checkpoints = (folder / "checkpoints").absolute()
    callbacks: list[Callback] = []
    # with sharded parameters no process has a whole network to explain
    if config.overlays and config.trainer.strategy != "fsdp":
        callbacks.append(AttentionOverlays(folder / "attention", config.overlays))
    # after the callbacks that look at the validated network, before those that save it
    if module.recipe.ema:
        callbacks.append(AverageWeights(module.recipe.ema))
    if module.frozen:
        callbacks.append(Freeze(module.frozen, module.recipe.unfreeze_epoch))
    callbacks.append(report)
    callbacks.append(report.speed)
    callbacks.append(StopOnNotFinite())
    callbacks.append(StopOnSignal(checkpoints / "last.ckpt"))
    if config.trainer.logger is not False:
        callbacks.append(LearningRateMonitor())
    callbacks += progress_bar(config)
    if config.patience:
        callbacks.append(EarlyStopping(module.monitor, mode="max", patience=config.patience))
    return callbacks + _checkpoint_callbacks(config, checkpoints, module.monitor)


def progress_bar(config: Namespace) -> list[Callback]:
    """Return the progress bar, unless ``trainer.enable_progress_bar`` is off."""
    if config.trainer.enable_progress_bar is False:
        return []
    return [Bar()]


def _checkpoint_callbacks(
    config: Namespace,
    folder: Path,
    monitor: str,
) -> list[Callback]:
    """Return what writes best.ckpt and last.ckpt."""
    callbacks: list[Callback] = [
        ModelCheckpoint(
            folder,
            filename="best",
            monitor=monitor,
            mode="max",
            enable_version_counter=False,
        ),
        ModelCheckpoint(
            folder,
            filename="last",
            every_n_epochs=1,
            enable_version_counter=False,
        ),
    ]
    if config.checkpoint_steps:
        by_steps = BetweenSteps(
            folder,
            filename="last",
            every_n_train_steps=config.checkpoint_steps,
            enable_version_counter=False,
        )
        callbacks.append(by_steps)
    if config.checkpoint_minutes:
        by_time = BetweenSteps(
            folder,
            filename="last",
            train_time_interval=timedelta(minutes=config.checkpoint_minutes),
            enable_version_counter=False,
        )
        callbacks.append(by_time)
    return callbacks


def _as_list(value: Any) -> list[Any]:
    """Return the objects of a key that names none (None, true, false), one or a list of them."""
    if value is None or isinstance(value, bool):
        return []
    if isinstance(value, list):
        return value
    return [value]
