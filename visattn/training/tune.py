"""Search a learning rate and a batch size before a training."""

from dataclasses import dataclass

import lightning.pytorch as pl
import torch
from lightning.pytorch.tuner import Tuner

SKIPPED_STEPS = 10  # at first the running mean of the losses is not settled


@dataclass(frozen=True)
class RangeTest:
    """The smoothed losses of a training whose learning rate grew step by step."""

    rates: list[float]
    losses: list[float]
    best_rate: float | None  # None: too few steps to tell


def search_batch_size(
    trainer: pl.Trainer,
    module: pl.LightningModule,
    data: pl.LightningDataModule,
) -> int | None:
    """Return the largest power of two that fits into the GPU's memory; None on other devices."""
    if trainer.strategy.root_device.type != "cuda":
        return None
    tuner = Tuner(trainer)
    return tuner.scale_batch_size(module, datamodule=data, mode="power", steps_per_trial=3)


def run_range_test(
    trainer: pl.Trainer,
    module: pl.LightningModule,
    data: pl.LightningDataModule,
) -> RangeTest:
    """Train 100 steps with a growing learning rate, and choose the rate from the losses."""
    finder = Tuner(trainer).lr_find(
        module, datamodule=data, min_lr=1e-6, max_lr=1, num_training=100, update_attr=False
    )
    if finder is None:  # in a trial run of Lightning (fast_dev_run)
        return RangeTest([], [], None)
    rates = finder.results["lr"][SKIPPED_STEPS:]
    losses = finder.results["loss"][SKIPPED_STEPS:]
    return RangeTest(rates, losses, steepest(rates, losses))


def steepest(rates: list[float], losses: list[float]) -> float | None:
    """Return the rate where the loss falls most steeply over log(rate), or None for too few rates.

    Lightning's own suggestion takes the slope over the rate itself, which favors tiny rates, where
    noise is divided by a tiny change of rate.
    """
    curve = torch.tensor(losses)
    usable = torch.isfinite(curve)
    if usable.sum() < 3:
        return None
    slopes = torch.gradient(curve[usable])[0]  # the rates grow by equal factors
    return float(torch.tensor(rates)[usable][slopes.argmin()])
