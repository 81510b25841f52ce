"""tune: which learning rate and which batch size a training could have."""

import lightning.pytorch as pl
from lightning.pytorch.tuner import Tuner


class Trainer(pl.Trainer):
    """Lightning's Trainer with one command more."""

    def tune(self, model: pl.LightningModule, datamodule: pl.LightningDataModule) -> None:
        """Look for the largest batch that fits into a GPU's memory, and for a learning rate that trains."""
        tuner = Tuner(self)
        self.batch_size = None  # without a GPU there is no edge to find
        if self.strategy.root_device.type == "cuda":
            self.batch_size = tuner.scale_batch_size(model, datamodule=datamodule, mode="power", steps_per_trial=3)
        found = tuner.lr_find(model, datamodule=datamodule, min_lr=1e-6, max_lr=1, num_training=100, update_attr=False)
        self.rates, self.losses = found.results["lr"], found.results["loss"]
        self.rate = found.suggestion()
