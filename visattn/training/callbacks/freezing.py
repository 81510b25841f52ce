"""Freezing: which parameters do not learn, and how the layers that hold them stay unchanged."""

from fnmatch import fnmatch

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from torch import nn

from visattn.models.weights import last_layer


def frozen_names(model: nn.Module, patterns: str) -> set[str]:
    """Return the parameters that ``Recipe.freeze`` names.

    Raises:
        ValueError: A pattern names no parameter, or nothing is left to learn.
    """
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    if patterns == "backbone":
        head, _ = last_layer(model)
        return {name for name in names if not name.startswith(f"{head}.")}
    frozen: set[str] = set()
    for pattern in patterns.split(","):
        if pattern.strip():
            frozen |= _match_names(pattern.strip(), names)
    if frozen and len(frozen) == len(names):
        raise ValueError(f"freeze: {patterns!r} leaves nothing to learn")
    return frozen


def _match_names(pattern: str, names: list[str]) -> set[str]:
    """Return the names that match a pattern of parameters or of modules that hold them."""
    matches = set()
    for name in names:
        if fnmatch(name, pattern) or fnmatch(name, f"{pattern}.*"):
            matches.add(name)
    if not matches:
        modules = sorted({name.partition(".")[0] for name in names})
        raise ValueError(
            f"freeze: {pattern!r} names no parameter; the network's parts are {', '.join(modules)}"
        )
    return matches


class Freeze(Callback):
    """Freeze layers until an epoch: no gradient, no dropout, frozen running statistics.

    Args:
        names: The parameters that do not learn.
        until: The epoch from which they do; 0 = never.
    """

    def __init__(self, names: set[str], until: int = 0):
        self.names = names
        self.until = until
        self.is_frozen = True

    def on_train_start(self, trainer, pl_module) -> None:
        self._set_layers(trainer, pl_module.model)

    def on_train_epoch_start(self, trainer, pl_module) -> None:
        # not called where a run resumes in the middle of an epoch: hence on_train_start too
        self._set_layers(trainer, pl_module.model)

    def _set_layers(
        self,
        trainer: pl.Trainer,
        model: nn.Module,
    ) -> None:
        """Freeze or unfreeze the layers, as the current epoch asks."""
        self.is_frozen = not self.until or trainer.current_epoch < self.until
        # Several processes agree once which gradients they exchange, so where layers unfreeze
        # later, on_before_optimizer_step drops the gradients instead.
        if trainer.world_size == 1 or not self.until:
            for name in self.names:
                model.get_parameter(name).requires_grad_(not self.is_frozen)
        for prefix, module in model.named_modules():
            names = [name for name, _ in module.named_parameters()]
            if prefix:
                names = [f"{prefix}.{name}" for name in names]
            if names and self.names.issuperset(names):
                module.train(not self.is_frozen)

    def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
        if self.is_frozen and trainer.world_size > 1:
            for name in self.names:
                pl_module.model.get_parameter(name).grad = None
