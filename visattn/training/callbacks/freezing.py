"""Freezing: which parameters do not learn, and how the layers that hold them are kept still."""

from fnmatch import fnmatch

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from torch import nn

from visattn.models.weights import last_layer


def frozen_names(model: nn.Module, patterns: str) -> set[str]:
    """Return the parameters that ``Recipe.freeze`` names; a pattern that names none is an error."""
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    if patterns == "backbone":
        head = last_layer(model)[0]
        return {name for name in names if not name.startswith(f"{head}.")}
    frozen = set()
    for pattern in filter(None, (part.strip() for part in patterns.split(","))):
        found = {name for name in names if fnmatch(name, pattern) or fnmatch(name, f"{pattern}.*")}
        if not found:
            parts = sorted({name.split(".")[0] for name in names})
            raise ValueError(
                f"freeze: {pattern!r} names no parameter; the network's parts are {', '.join(parts)}"
            )
        frozen |= found
    if frozen and len(frozen) == len(names):
        raise ValueError(f"freeze: {patterns!r} leaves nothing to learn")
    return frozen


class Freeze(Callback):
    """Keep layers still up to an epoch: no gradient, no dropout, and running statistics that do not run.

    Args:
        names: The parameters that do not learn.
        until: The epoch from which they do; 0 = never.
    """

    def __init__(self, names: set[str], until: int = 0):
        self.names = names
        self.until = until
        self.held = True

    def on_train_start(self, trainer, pl_module) -> None:
        self._hold(trainer, pl_module)

    on_train_epoch_start = (
        on_train_start  # which a run that goes on in the middle of an epoch leaves out
    )

    def _hold(self, trainer, pl_module: pl.LightningModule) -> None:
        self.held = not self.until or trainer.current_epoch < self.until
        model = pl_module.model
        for name, parameter in model.named_parameters():
            # Several processes agree once which gradients they will exchange, so there it is
            # dropped when it comes.
            if name in self.names and (trainer.world_size == 1 or not self.until):
                parameter.requires_grad_(not self.held)
        for prefix, module in model.named_modules():
            inner = [
                f"{prefix}.{name}" if prefix else name for name, _ in module.named_parameters()
            ]
            if inner and self.names.issuperset(inner):
                module.train(not self.held)

    def on_before_optimizer_step(self, trainer, pl_module: pl.LightningModule, optimizer) -> None:
        if self.held and trainer.world_size > 1:
            for name, parameter in pl_module.model.named_parameters():
                if name in self.names:
                    parameter.grad = None
