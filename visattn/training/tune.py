"""tune: which learning rate and which batch size a training could have."""

import lightning.pytorch as pl
import torch
from lightning.pytorch.tuner import Tuner

SKIPPED = 10  # first steps, in which the mean of the losses still starts up


class Trainer(pl.Trainer):
    """Lightning's Trainer with one command more."""

    def tune(self, model: pl.LightningModule, datamodule: pl.LightningDataModule) -> None:
        """Look for the largest batch that fits into a GPU's memory, and for a learning rate that trains."""
        tuner = Tuner(self)
        self.batch_size = None  # without a GPU there is no edge to find
        if self.strategy.root_device.type == "cuda":
            self.batch_size = tuner.scale_batch_size(
                model, datamodule=datamodule, mode="power", steps_per_trial=3
            )
        found = tuner.lr_find(
            model, datamodule=datamodule, min_lr=1e-6, max_lr=1, num_training=100, update_attr=False
        )
        self.rates, self.losses = (found.results[key][SKIPPED:] for key in ("lr", "loss"))
        self.rate = steepest(self.rates, self.losses)


def steepest(rates: list[float], losses: list[float]) -> float | None:
    """Return the rate at which the loss falls most steeply over the rate's logarithm, or None for too few rates.

    Lightning's own suggestion takes the slope over the rate itself, which favors tiny rates, where
    a change of noise stands over a tiny change of rate.
    """
    curve = torch.tensor(losses)
    usable = torch.isfinite(curve)
    if usable.sum() < 3:
        return None
    slopes = torch.gradient(curve[usable])[0]  # the rates grow by equal factors
    return float(torch.tensor(rates)[usable][slopes.argmin()])
