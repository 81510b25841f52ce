"""ImageClassifier: how an image classifier is trained, validated and asked."""

import copy
import math

import lightning.pytorch as pl
import numpy as np
import torch
from timm.optim import create_optimizer_v2
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from torchmetrics import MeanMetric

from visattn.training.callbacks.freezing import frozen_names
from visattn.training.checkpoint_io import FORMAT, KEY
from visattn.training.measures import confusion, measures
from visattn.training.network import build_network
from visattn.training.recipe import Recipe, resized
from visattn.training.resume import refuse_other_optimizer
from visattn.training.sharded_parameters import any_has_batch, shard


class ImageClassifier(pl.LightningModule):
    r"""Train a network by the cross entropy of its class scores.

    .. math::
        L = -\sum_c \tilde{y}_c \log \mathrm{softmax}(f(x))_c

    with :math:`\tilde{y}` the smoothed and perhaps mixed target. All random draws of a training step (drop path,
    dropout, mixup) come from a seed made of (seed, process, epoch, batch), so that a resumed run
    repeats what an uninterrupted one would have drawn.

    Args:
        network: The arguments of ``build_network``: name, num_classes, image_size, weights, insert,
            options ...
        recipe: The numbers of the training.
        seed: First part of every training step's seed.
        multilabel: An image may have several classes: labels are (B, C) of zeros and ones.
        compile: Compile the network.
        channels_last: Keep images and weights in channels-last memory order.

    Shape:
        - Input: images (B, 3, H, W).
        - Output: class scores (B, num_classes).

    Raises:
        ValueError: The recipe does not fit the network or the labels; a checkpoint holds another
            network, other classes or another transform than this one.

    Example:
        >>> module = ImageClassifier({"name": "timm:resnet10t", "num_classes": 3, "image_size": 32})
        >>> module(torch.rand(2, 3, 32, 32)).shape
        torch.Size([2, 3])
    """

    def __init__(
        self,
        network: dict,
        *,
        recipe: Recipe | None = None,
        seed: int = 0,
        multilabel: bool = False,
        compile: bool = False,
        channels_last: bool = False,
    ):
        super().__init__()
        self.network = network
        self.recipe = recipe or Recipe()
        self.seed = seed
        self.multilabel = multilabel
        self.model = build_network(**network)
        self.frozen = frozen_names(self.model, self.recipe.freeze)
        _check(self.recipe, multilabel, self.model)
        if not self.recipe.unfreeze_epoch:
            for name in self.frozen:
                self.model.get_parameter(name).requires_grad_(False)
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self.model.to(memory_format=self.memory_format)
        if compile:
            self.model.compile()
        classes = network["num_classes"]
        self.mix = self.recipe.mix(classes)
        self.weights, self.sharded = None, False
        self.measures = measures(classes, multilabel)
        self.confusion = confusion(classes, multilabel)
        self.mean_loss = MeanMetric()

    @property
    def monitor(self) -> str:
        """The number by which one epoch is better than another."""
        return "val_map" if self.multilabel else "val_accuracy"

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images.contiguous(memory_format=self.memory_format))

    def configure_model(self) -> None:
        mesh = self.device_mesh  # only the strategy for sharded parameters makes one
        if mesh is not None and not self.sharded:
            shard(self.model, mesh["data_parallel"])
            self.sharded = True

    def on_fit_start(self) -> None:
        if self.recipe.class_weights == "balanced":
            self.weights = torch.tensor(self.trainer.datamodule.class_weights, device=self.device)

    def on_train_start(self) -> None:
        # an epoch of few batches must leave a point of the training's curve too
        batches = self.trainer.num_training_batches
        self.trainer.log_every_n_steps = max(1, min(self.trainer.log_every_n_steps, batches))

    def on_train_batch_start(self, batch, batch_idx: int) -> None:
        parts = [self.seed, self.global_rank, self.current_epoch, batch_idx]
        torch.manual_seed(int(np.random.SeedSequence(parts).generate_state(1)[0]))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        mixed, targets = self.mix(images, labels) if self.mix else (images, labels)
        scores = self(self._grown(mixed))
        loss = self.recipe.objective(scores, targets, self.weights)
        # logging costs about a millisecond a value: only the steps that a logger writes, and the
        # first of an epoch
        if batch_idx == 0 or (self.global_step + 1) % self.trainer.log_every_n_steps == 0:
            self._log_step(loss.detach(), scores.detach(), targets)
        return loss

    def _log_step(self, loss: Tensor, scores: Tensor, targets: Tensor) -> None:
        self.log("train_loss", loss, prog_bar=True, on_step=True)
        if not self.recipe.plain:
            self.log("train_plain_loss", self.recipe.plain_loss(scores, targets), on_step=True)
        if self.mix:  # a mixed image has no one class that would be right
            return
        right = (scores > 0) == (targets > 0) if self.multilabel else scores.argmax(1) == targets
        self.log("train_accuracy", right.float().mean(), prog_bar=True, on_step=True)

    def _grown(self, images: Tensor) -> Tensor:
        if not self.recipe.start_size:
            return images
        full = min(images.shape[-2:])
        side = self.recipe.side(full, self.current_epoch, self.epochs)
        return images if side == full else resized(images, side / full)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return self._measure(batch)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return self._measure(batch)

    def on_validation_epoch_end(self) -> None:
        self._catch_up()
        self._report("val")

    def on_test_epoch_end(self) -> None:
        self._catch_up()
        self._report("test")

    def on_predict_epoch_end(self) -> None:
        self._catch_up()

    def predict_step(
        self, batch: tuple[Tensor, list[str]], batch_idx: int
    ) -> tuple[list[str], Tensor]:
        images, names = batch
        return names, self.recipe.probabilities(self._viewed(images))

    def _viewed(self, images: Tensor) -> Tensor:
        if self.sharded:
            any_has_batch(True, self.device)
        return self.recipe.scores(self, images)

    def _catch_up(self) -> None:
        """Pass a blank image on while another process has batches left: its passes need the shards of this one too."""
        while self.sharded and any_has_batch(False, self.device):
            size, kind = self.trainer.datamodule.image_size, next(self.model.parameters()).dtype
            self.recipe.scores(self, torch.zeros(1, 3, *size, device=self.device, dtype=kind))

    def _measure(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        images, labels = batch
        scores = self._viewed(images)
        probabilities = self.recipe.probabilities(scores)
        self.measures.update(probabilities, labels.long())
        if self.confusion is not None:
            self.confusion.update(probabilities, labels)
        self.mean_loss.update(self.recipe.plain_loss(scores, labels), len(labels))
        return probabilities

    def _report(self, split: str) -> None:
        several = self.trainer.world_size > 1
        self.matrix = None if self.confusion is None else self.confusion.compute()
        self.log(f"{split}_loss", self.mean_loss, prog_bar=True)
        for name, value in self.measures.compute().items():
            self.log(f"{split}_{name}", value, prog_bar=True, sync_dist=several)
        for metric in (self.measures, self.confusion):
            if metric is not None:
                metric.reset()

    def configure_optimizers(self) -> dict:
        recipe, optimizer = self.recipe, self._optimizer()
        per_epoch, steps = planned_steps(self.trainer)
        self.epochs = math.ceil(steps / per_epoch)
        warmup = round(recipe.warmup_epochs * per_epoch)
        schedule = LambdaLR(optimizer, lambda step: recipe.rate(step, steps, warmup))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _optimizer(self) -> torch.optim.Optimizer:
        recipe, names = (
            self.recipe,
            {id(weight): name for name, weight in self.model.named_parameters()},
        )
        optimizer = create_optimizer_v2(
            self.model,
            recipe.optimizer,
            lr=recipe.lr,
            weight_decay=1.0,  # without decay timm makes other groups, which no checkpoint with decay would fit
            filter_bias_and_bn=True,
            layer_decay=recipe.layer_decay if recipe.layer_decay < 1 else None,
        )
        for group in optimizer.param_groups:
            group["weight_decay"] *= recipe.weight_decay
            group["lr"] = recipe.lr * group.get(
                "lr_scale", 1.0
            )  # timm's own schedulers would do this
            group["param_names"] = [names[id(weight)] for weight in group["params"]]
        return optimizer

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        data = self.trainer.datamodule
        checkpoint[KEY] = {
            "format": FORMAT,
            "network": _rebuilt(self.network),
            "classes": list(data.classes),
            "transform": data.transform_config(),
            "several": self.recipe.loss == "bce",
            "optimizer": self.recipe.optimizer,
        }

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        refuse_other(checkpoint[KEY]["network"], _rebuilt(self.network))
        if self.trainer.training:
            self._take_over(checkpoint)

    def _take_over(self, checkpoint: dict) -> None:
        wanted = self._optimizer().param_groups
        refuse_other_optimizer(checkpoint, wanted, self.recipe.optimizer)
        groups = [state["param_groups"] for state in checkpoint.get("optimizer_states", ())]
        groups += [
            optimizer.param_groups for optimizer in self.trainer.optimizers
        ]  # sharded ones are loaded already
        for group, new in (
            (group, new) for side in groups for group, new in zip(side, wanted, strict=True)
        ):
            old = group["initial_lr"] or 1.0
            group |= {
                key: new[key] for key in ("weight_decay", "lr_scale", "param_names") if key in new
            }
            group["lr"], group["initial_lr"] = group["lr"] * new["lr"] / old, new["lr"]
        for state in checkpoint.get("lr_schedulers", ()):
            state["base_lrs"] = [group["lr"] for group in wanted]


def planned_steps(trainer: pl.Trainer) -> tuple[int, int]:
    """Return the optimizer's steps in an epoch and in the whole training.

    ``trainer.estimated_stepping_batches`` starts the training loader, too early: a checkpoint that
    is loaded after it cannot move the loader to the place in the epoch where training stopped.
    """
    batches, limit = len(trainer.datamodule.train_dataloader()), trainer.limit_train_batches
    batches = min(batches, limit) if isinstance(limit, int) else int(batches * limit)
    per_epoch = max(1, -(-batches // trainer.accumulate_grad_batches))
    epochs = math.inf if trainer.max_epochs in (None, -1) else trainer.max_epochs
    steps = min(per_epoch * epochs, math.inf if trainer.max_steps == -1 else trainer.max_steps)
    if steps == math.inf:
        raise ValueError("the schedule needs an end: give trainer.max_epochs or trainer.max_steps")
    return per_epoch, int(steps)


def refuse_other(found: dict, wanted: dict) -> None:
    """Raise where the network of a checkpoint is not the one wanted, naming the first difference."""
    for key in wanted:
        if found.get(key) != wanted[key]:
            raise ValueError(
                f"the checkpoint holds another model: its {key} is {found.get(key)!r}, not {wanted[key]!r}; "
                "the config.yaml of its run fits it"
            )


def _rebuilt(network: dict) -> dict:
    """Return how the network is built where its weights come from a checkpoint."""
    return {**network, "pretrained": False, "weights": None}


def _check(recipe: Recipe, multilabel: bool, model: torch.nn.Module) -> None:
    """Refuse a recipe that the labels or the network cannot follow."""
    if multilabel and recipe.loss != "bce":
        raise ValueError("images with several labels need loss='bce', class by class")
    if multilabel and (recipe.mixup or recipe.cutmix):
        raise ValueError("mixup and cutmix need one label per image, not several")
    if recipe.layer_decay < 1 and not hasattr(model, "group_matcher"):
        raise ValueError(
            f"layer_decay needs a network that tells its layers (group_matcher); {_kind(model)} does not"
        )
    if recipe.start_size:
        images = torch.empty(2, 3, recipe.start_size, recipe.start_size, device="meta")
        try:
            copy.deepcopy(model).to("meta").eval()(images)
        except Exception as error:  # each architecture has its own words for it
            raise ValueError(
                f"start_size: {_kind(model)} is built for one image size ({error})"
            ) from error


def _kind(model: torch.nn.Module) -> str:
    return type(model).__name__
