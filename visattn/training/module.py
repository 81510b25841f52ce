"""ImageClassifier: how an image classifier is trained, validated and used for prediction."""

import copy
import math
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torchmetrics import MeanMetric

from visattn.data.module import ImageData
from visattn.training.callbacks.freezing import frozen_names
from visattn.training.checkpoint_io import FORMAT, KEY
from visattn.training.measures import confusion, measures
from visattn.training.network import build_network
from visattn.training.optimizer import build_optimizer, overwrite_checkpoint_rates, planned_steps
from visattn.training.recipe import Recipe, resized
from visattn.training.resume import refuse_other_optimizer
from visattn.training.sharded_parameters import any_has_batch, shard


class ImageClassifier(pl.LightningModule):
    r"""Train a network by the cross entropy of its class scores.

    .. math::
        L = -\sum_c \tilde{y}_c \log \mathrm{softmax}(f(x))_c

    with :math:`\tilde{y}` the smoothed and perhaps mixed target. All random draws of a training
    step (drop path, dropout, mixup) come from a seed made of (seed, process, epoch, batch), so that
    a resumed run repeats what an uninterrupted one would have drawn.

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

    model: nn.Module

    def __init__(
        self,
        network: dict[str, Any],
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
        _check_recipe(self.recipe, multilabel, self.model)
        if not self.recipe.unfreeze_epoch:
            for name in self.frozen:
                self.model.get_parameter(name).requires_grad_(False)
        self.memory_format = torch.contiguous_format
        if channels_last:
            self.memory_format = torch.channels_last
        self.model.to(memory_format=self.memory_format)
        if compile:
            self.model.compile()

        num_classes = network["num_classes"]
        self.mix = self.recipe.mix(num_classes)
        self.class_weights: Tensor | None = None
        self.sharded = False
        self.measures = measures(num_classes, multilabel)
        self.confusion = confusion(num_classes, multilabel)
        self.mean_loss = MeanMetric()
        self.matrix: Tensor | None = None  # confusion matrix of the last validation or test

    @property
    def data(self) -> ImageData:
        """The data module that Lightning attached to the trainer."""
        return self.trainer.datamodule  # type: ignore[attr-defined]  # Lightning declares it late

    @property
    def monitor(self) -> str:
        """Name of the number by which one epoch is better than another."""
        if self.multilabel:
            return "val_map"
        return "val_accuracy"

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images.contiguous(memory_format=self.memory_format))

    def configure_model(self) -> None:
        mesh = self.device_mesh  # only the strategy for sharded parameters makes one
        if mesh is not None and not self.sharded:
            shard(self.model, mesh["data_parallel"])
            self.sharded = True

    # Training.

    def on_fit_start(self) -> None:
        if self.recipe.class_weights == "balanced":
            self.class_weights = torch.tensor(self.data.class_weights, device=self.device)

    def on_train_start(self) -> None:
        # an epoch of few batches must leave a point of the training's curve too
        trainer: Any = self.trainer  # its attributes are set by Lightning's connectors
        batches = trainer.num_training_batches
        trainer.log_every_n_steps = max(1, min(trainer.log_every_n_steps, batches))

    def on_train_batch_start(self, batch, batch_idx: int) -> None:
        entropy = [self.seed, self.global_rank, self.current_epoch, batch_idx]
        step_seed = np.random.SeedSequence(entropy).generate_state(1)[0]
        torch.manual_seed(int(step_seed))

    def training_step(
        self,
        batch: tuple[Tensor, Tensor],
        batch_idx: int,
    ) -> Tensor:
        images, targets = batch
        if self.mix is not None:
            images, targets = self.mix(images, targets)  # targets: (B,) -> (B, C)
        scores = self(self._shrink_for_epoch(images))
        loss = self.recipe.objective(scores, targets, self.class_weights)
        # logging costs about a millisecond a value: only the steps that a logger writes, and the
        # first of an epoch
        if batch_idx == 0 or self._is_logged_step():
            self._log_step(loss.detach(), scores.detach(), targets)
        return loss

    def _is_logged_step(self) -> bool:
        trainer: Any = self.trainer  # Lightning sets log_every_n_steps later
        return (self.global_step + 1) % trainer.log_every_n_steps == 0

    def _log_step(
        self,
        loss: Tensor,
        scores: Tensor,
        targets: Tensor,
    ) -> None:
        self.log("train_loss", loss, prog_bar=True, on_step=True)
        if not self.recipe.plain:
            self.log("train_plain_loss", self.recipe.plain_loss(scores, targets), on_step=True)
        if self.mix is not None:  # a mixed image has no single right class
            return
        if self.multilabel:
            right = (scores > 0) == (targets > 0)  # (B, C)
        else:
            right = scores.argmax(1) == targets  # (B,)
        self.log("train_accuracy", right.float().mean(), prog_bar=True, on_step=True)

    def _shrink_for_epoch(self, images: Tensor) -> Tensor:
        """Resize training images where the recipe lets them grow from ``start_size``."""
        if not self.recipe.start_size:
            return images
        full_size = min(images.shape[-2:])
        epoch_size = self.recipe.side(full_size, self.current_epoch, self.epochs)
        if epoch_size == full_size:
            return images
        return resized(images, epoch_size / full_size)

    # Validation, test and prediction.

    def validation_step(
        self,
        batch: tuple[Tensor, Tensor],
        batch_idx: int,
    ) -> Tensor:
        return self._update_measures(batch)

    def test_step(
        self,
        batch: tuple[Tensor, Tensor],
        batch_idx: int,
    ) -> Tensor:
        return self._update_measures(batch)

    def predict_step(
        self,
        batch: tuple[Tensor, list[str]],
        batch_idx: int,
    ) -> tuple[list[str], Tensor]:
        images, names = batch
        return names, self.recipe.probabilities(self._evaluate(images))

    def on_validation_epoch_end(self) -> None:
        self._join_remaining_batches()
        self._log_measures("val")

    def on_test_epoch_end(self) -> None:
        self._join_remaining_batches()
        self._log_measures("test")

    def on_predict_epoch_end(self) -> None:
        self._join_remaining_batches()

    def _evaluate(self, images: Tensor) -> Tensor:
        """Return the scores (B, C) of images, averaged over the recipe's views."""
        if self.sharded:
            any_has_batch(True, self.device)
        return self.recipe.scores(self, images)

    def _join_remaining_batches(self) -> None:
        """Pass blank images while another process has batches left.

        With sharded parameters every forward pass needs the pieces of all processes.
        """
        while self.sharded and any_has_batch(False, self.device):
            height, width = self.data.image_size
            dtype = next(self.model.parameters()).dtype
            blank = torch.zeros(1, 3, height, width, device=self.device, dtype=dtype)
            self.recipe.scores(self, blank)

    def _update_measures(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        images, labels = batch
        scores = self._evaluate(images)
        probabilities = self.recipe.probabilities(scores)
        self.measures.update(probabilities, labels.long())
        if self.confusion is not None:
            self.confusion.update(probabilities, labels)
        self.mean_loss.update(self.recipe.plain_loss(scores, labels), len(labels))
        return probabilities

    def _log_measures(self, split: str) -> None:
        self.log(f"{split}_loss", self.mean_loss, prog_bar=True)
        between_processes = self.trainer.world_size > 1
        self.matrix = None
        if self.confusion is not None:
            self.matrix = self.confusion.compute()
            self.confusion.reset()
        for name, value in self.measures.compute().items():
            self.log(f"{split}_{name}", value, prog_bar=True, sync_dist=between_processes)
        self.measures.reset()

    # Optimizer and checkpoints.

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        recipe = self.recipe
        optimizer = build_optimizer(self.model, recipe)
        steps_per_epoch, steps = planned_steps(self.trainer)
        self.epochs = math.ceil(steps / steps_per_epoch)
        warmup = round(recipe.warmup_epochs * steps_per_epoch)
        schedule = LambdaLR(optimizer, lambda step: recipe.rate(step, steps, warmup))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint[KEY] = {
            "format": FORMAT,
            "network": _without_weights(self.network),
            "classes": list(self.data.classes),
            "transform": self.data.transform_config(),
            "several": self.recipe.loss == "bce",  # multilabel; the key is part of the format
            "optimizer": self.recipe.optimizer,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        refuse_other_network(checkpoint[KEY]["network"], _without_weights(self.network))
        if self.trainer.training:
            groups = build_optimizer(self.model, self.recipe).param_groups
            refuse_other_optimizer(checkpoint, groups, self.recipe.optimizer)
            overwrite_checkpoint_rates(checkpoint, self.trainer.optimizers, groups)


def refuse_other_network(saved: dict[str, Any], current: dict[str, Any]) -> None:
    """Raise where a checkpoint's network is not the configured one, naming the difference."""
    for key, value in current.items():
        if saved.get(key) != value:
            raise ValueError(
                f"the checkpoint holds another model: its {key} is {saved.get(key)!r}, not "
                f"{value!r}; the config.yaml of its run fits it"
            )


def _without_weights(network: dict[str, Any]) -> dict[str, Any]:
    """Return how the network is built where its weights come from a checkpoint."""
    return {**network, "pretrained": False, "weights": None}


def _check_recipe(
    recipe: Recipe,
    multilabel: bool,
    model: nn.Module,
) -> None:
    """Refuse a recipe that does not fit the labels or the network."""
    if multilabel and recipe.loss != "bce":
        raise ValueError("images with several labels need loss='bce', class by class")
    if multilabel and (recipe.mixup or recipe.cutmix):
        raise ValueError("mixup and cutmix need one label per image, not several")
    model_name = type(model).__name__
    if recipe.layer_decay < 1 and not hasattr(model, "group_matcher"):
        raise ValueError(
            "layer_decay needs a network that names its layers (group_matcher); "
            f"{model_name} does not"
        )
    if recipe.start_size:
        images = torch.empty(2, 3, recipe.start_size, recipe.start_size, device="meta")
        try:
            copy.deepcopy(model).to("meta").eval()(images)
        except Exception as error:  # each architecture raises its own type
            raise ValueError(
                f"start_size: {model_name} is built for one image size ({error})"
            ) from error
