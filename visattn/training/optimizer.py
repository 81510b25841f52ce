"""The optimizer of a training: its parameter groups, planned steps, and state on a resume."""

import math
from collections.abc import Iterable
from typing import Any

import lightning.pytorch as pl
import torch
from timm.optim import create_optimizer_v2
from torch import nn

from visattn.training.recipe import Recipe


def build_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """Return a recipe's optimizer; norms, biases and other vectors get no weight decay."""
    layer_decay = None
    if recipe.layer_decay < 1:
        layer_decay = recipe.layer_decay
    optimizer = create_optimizer_v2(
        model,
        recipe.optimizer,
        lr=recipe.lr,
        # without decay timm makes other groups, which no checkpoint with decay would fit
        weight_decay=1.0,
        filter_bias_and_bn=True,
        layer_decay=layer_decay,
    )
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for group in optimizer.param_groups:
        group["weight_decay"] *= recipe.weight_decay
        group["lr"] = recipe.lr * group.get("lr_scale", 1.0)  # else timm's schedulers do this
        group["param_names"] = [names[id(parameter)] for parameter in group["params"]]
    return optimizer


def planned_steps(trainer: pl.Trainer) -> tuple[int, int]:
    """Return the optimizer's steps in an epoch and in the whole training.

    ``trainer.estimated_stepping_batches`` starts the training loader, too early: a checkpoint that
    is loaded after it cannot move the loader to the place in the epoch where training stopped.
    """
    loader = trainer.datamodule.train_dataloader()  # type: ignore[attr-defined]  # declared late
    limit = trainer.limit_train_batches
    if isinstance(limit, int):
        batches = min(len(loader), limit)
    else:  # a share of the batches
        batches = int(len(loader) * limit)
    steps_per_epoch = max(1, math.ceil(batches / trainer.accumulate_grad_batches))

    limits: list[float] = []
    if trainer.max_epochs not in (None, -1):
        limits.append(steps_per_epoch * trainer.max_epochs)
    if trainer.max_steps != -1:
        limits.append(trainer.max_steps)
    if not limits:
        raise ValueError("the schedule needs an end: give trainer.max_epochs or trainer.max_steps")
    return steps_per_epoch, int(min(limits))


def overwrite_checkpoint_rates(
    checkpoint: dict[str, Any],
    optimizers: Iterable[torch.optim.Optimizer],
    groups: list[dict[str, Any]],
) -> None:
    """Give saved optimizer state the rates and decays of ``groups``: config beats checkpoint.

    Args:
        checkpoint: The checkpoint before it is loaded.
        optimizers: The trainer's optimizers; with sharded parameters their state is loaded already.
        groups: The parameter groups as the recipe makes them now.
    """
    loaded = [state["param_groups"] for state in checkpoint.get("optimizer_states", ())]
    loaded += [optimizer.param_groups for optimizer in optimizers]
    for saved_groups in loaded:
        for saved, current in zip(saved_groups, groups, strict=True):
            _overwrite_group(saved, current)
    for state in checkpoint.get("lr_schedulers", ()):
        state["base_lrs"] = [group["lr"] for group in groups]


def _overwrite_group(saved: dict[str, Any], current: dict[str, Any]) -> None:
    for key in ("weight_decay", "lr_scale", "param_names"):
        if key in current:
            saved[key] = current[key]
    saved_peak = saved["initial_lr"] or 1.0
    saved["lr"] = saved["lr"] * current["lr"] / saved_peak  # the same place on the new schedule
    saved["initial_lr"] = current["lr"]
