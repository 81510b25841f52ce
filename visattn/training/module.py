"""ImageClassifier: how an image classifier is trained, validated and asked."""

import math
from dataclasses import dataclass
from difflib import get_close_matches

import lightning.pytorch as pl
import numpy as np
import torch
import torch.nn.functional as F
from timm.optim import create_optimizer_v2, list_optimizers
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy, MulticlassConfusionMatrix
from torchvision.transforms import v2

from visattn.training.checkpoint import FORMAT, KEY, build_network


@dataclass(frozen=True)
class Recipe:
    """How a network is trained: the numbers one tunes.

    Args:
        optimizer: A name of timm's optimizers; norms, biases and other vectors get no weight decay.
        lr: Highest learning rate, reached after the warm-up.
        weight_decay: Decoupled weight decay.
        warmup_epochs: Epochs of linear warm-up, counted in steps; a cosine to zero follows.
        label_smoothing: Share of the target spread evenly over all classes.
        mixup: Parameter of mixup's Beta distribution; 0 turns it off.
        cutmix: The same of CutMix; where both are on, each batch gets one of them.
        ema: Decay of the running average of the weights that is validated and kept; 0 turns it off.

    Raises:
        ValueError: The optimizer is unknown or a number out of range.
    """

    optimizer: str = "adamw"
    lr: float = 1e-3
    weight_decay: float = 0.05
    warmup_epochs: float = 1.0
    label_smoothing: float = 0.1
    mixup: float = 0.0
    cutmix: float = 0.0
    ema: float = 0.0

    def __post_init__(self):
        if self.optimizer not in (known := list_optimizers()):
            near = get_close_matches(self.optimizer, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(known)}"
            raise ValueError(f"optimizer: there is no {self.optimizer!r}; {hint}")
        for name in ("lr", "weight_decay", "warmup_epochs", "mixup", "cutmix"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be 0 or more, got {getattr(self, name)}")
        for name in ("label_smoothing", "ema"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must lie in [0, 1), got {getattr(self, name)}")

    def rate(self, step: int, steps: int, warmup: int) -> float:
        """Return the share of ``lr`` that step number ``step`` of ``steps`` uses."""
        if step < warmup:
            return (step + 1) / (warmup + 1)
        return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / max(1, steps - warmup))))

    def mix(self, num_classes: int):
        """Return what mixes a batch of images and labels, or None."""
        kinds = ((v2.MixUp, self.mixup), (v2.CutMix, self.cutmix))
        mixes = [kind(alpha=alpha, num_classes=num_classes) for kind, alpha in kinds if alpha > 0]
        return v2.RandomChoice(mixes) if mixes else None


class ImageClassifier(pl.LightningModule):
    r"""Train a network by the cross entropy of its class scores.

    .. math::
        L = -\sum_c \tilde{y}_c \log \mathrm{softmax}(f(x))_c

    with :math:`\tilde{y}` the smoothed and perhaps mixed target. All random draws of a training step (drop path,
    dropout, mixup) come from a seed made of (seed, process, epoch, batch), so that a resumed run repeats what an
    uninterrupted one would have drawn.

    Args:
        network: The arguments of ``build_network``: name, num_classes, image_size, pretrained, insert, options.
        recipe: The numbers of the training.
        seed: First part of every training step's seed.
        compile: Compile the network.
        channels_last: Keep images and weights in channels-last memory order.

    Shape:
        - Input: images (B, 3, H, W).
        - Output: class scores (B, num_classes).

    Raises:
        ValueError: A checkpoint holds another network, other classes or another transform than this one.

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
        compile: bool = False,
        channels_last: bool = False,
    ):
        super().__init__()
        self.network = network
        self.recipe = recipe or Recipe()
        self.seed = seed
        self.model = build_network(**network)
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self.model.to(memory_format=self.memory_format)
        if compile:
            self.model.compile()
        classes = network["num_classes"]
        self.mix = self.recipe.mix(classes)
        self.accuracy = MulticlassAccuracy(classes, average="micro")
        self.confusion = MulticlassConfusionMatrix(classes)
        self.mean_loss = MeanMetric()

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images.contiguous(memory_format=self.memory_format))

    def on_train_batch_start(self, batch, batch_idx: int) -> None:
        parts = [self.seed, self.global_rank, self.current_epoch, batch_idx]
        torch.manual_seed(int(np.random.SeedSequence(parts).generate_state(1)[0]))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        mixed, targets = self.mix(images, labels) if self.mix else (images, labels)
        scores = self(mixed)
        loss = F.cross_entropy(scores, targets, label_smoothing=self.recipe.label_smoothing)
        self.log("train_loss", loss.detach(), prog_bar=True, on_step=True)
        self.log("train_accuracy", (scores.detach().argmax(1) == labels).float().mean(), prog_bar=True, on_step=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self._measure(batch)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self._measure(batch)

    def on_validation_epoch_end(self) -> None:
        self._report("val")

    def on_test_epoch_end(self) -> None:
        self._report("test")

    def predict_step(self, batch: tuple[Tensor, list[str]], batch_idx: int) -> tuple[list[str], Tensor]:
        images, names = batch
        return names, self(images).float().softmax(1)

    def _measure(self, batch: tuple[Tensor, Tensor]) -> None:
        images, labels = batch
        scores = self(images).float()
        self.accuracy.update(scores, labels)
        self.confusion.update(scores, labels)
        self.mean_loss.update(F.cross_entropy(scores, labels), len(labels))

    def _report(self, split: str) -> None:
        self.matrix = self.confusion.compute()
        self.log(f"{split}_loss", self.mean_loss, prog_bar=True)
        self.log(f"{split}_accuracy", self.accuracy, prog_bar=True)
        self.confusion.reset()

    def configure_optimizers(self) -> dict:
        recipe = self.recipe
        optimizer = create_optimizer_v2(
            self.model, recipe.optimizer, lr=recipe.lr, weight_decay=recipe.weight_decay, filter_bias_and_bn=True
        )
        per_epoch, steps = planned_steps(self.trainer)
        warmup = round(recipe.warmup_epochs * per_epoch)
        schedule = LambdaLR(optimizer, lambda step: recipe.rate(step, steps, warmup))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        data = self.trainer.datamodule
        checkpoint[KEY] = {
            "format": FORMAT,
            "network": {**self.network, "pretrained": False},
            "classes": list(data.classes),
            "transform": data.transform_config(),
        }

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        refuse_other(checkpoint[KEY]["network"], {**self.network, "pretrained": False})
        for state in checkpoint.get("optimizer_states", ()):
            for group in state["param_groups"]:
                old = group["initial_lr"] or 1.0
                group["lr"], group["initial_lr"] = group["lr"] * self.recipe.lr / old, self.recipe.lr
                group["weight_decay"] = self.recipe.weight_decay if group["weight_decay"] else 0.0
        for state in checkpoint.get("lr_schedulers", ()):
            state["base_lrs"] = [self.recipe.lr] * len(state["base_lrs"])


def planned_steps(trainer: pl.Trainer) -> tuple[int, int]:
    """Return the optimizer's steps in an epoch and in the whole training.

    ``trainer.estimated_stepping_batches`` starts the training loader, too early: a checkpoint that is loaded after it
    cannot move the loader to the place in the epoch where training stopped.
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
