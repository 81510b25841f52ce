"""Recipe: the numbers and words one tunes, and the arithmetic that is nothing but theirs."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch.nn.functional as F
from timm.optim import list_optimizers
from torch import Tensor
from torchvision.transforms import v2

from visattn.names import suggest

LOSSES = ("cross_entropy", "bce")
WEIGHTS = ("none", "balanced")
VIEWS = ("none", "flip")


@dataclass(frozen=True)
class Recipe:
    """How a network is trained.

    Args:
        optimizer: A name of timm's optimizers; norms, biases and other vectors get no weight decay.
        lr: Highest learning rate, reached after the warm-up.
        weight_decay: Decoupled weight decay.
        layer_decay: Factor of the learning rate from each layer to the one before it; 1 treats all
            alike.
        warmup_epochs: Epochs of linear warm-up, counted in steps; a cosine to zero follows.
        loss: "cross_entropy" of one class among all, or "bce", the binary cross entropy of each
            class on its own.
        class_weights: "balanced" weighs a class in inverse proportion to its training images;
            "none" weighs all alike.
        label_smoothing: Share of the target spread evenly over all classes.
        mixup: Parameter of mixup's Beta distribution; 0 turns it off.
        cutmix: The same of CutMix; where both are on, each batch gets one of them.
        ema: Decay, such as 0.999, of the running average of the weights that is validated and kept;
            0 turns it off.
        freeze: Patterns of parameter names that do not learn, such as
            "patch_embed.*,blocks.[0-5].*", or "backbone", all but the last layer, which is a linear
            probe; "" freezes nothing.
        unfreeze_epoch: Epoch from which everything learns; 0 = never.
        start_size: Side of the training images in the first epoch; it grows to the full one over
            two thirds of the training. 0 = always the full one.
        views: "flip" averages the answers for an image and its mirror image in validation and
            prediction; "none".

    Raises:
        ValueError: A word is unknown or a number out of range.
    """

    optimizer: str = "adamw"
    lr: float = 1e-3
    weight_decay: float = 0.05
    layer_decay: float = 1.0
    warmup_epochs: float = 1.0
    loss: str = "cross_entropy"
    class_weights: str = "none"
    label_smoothing: float = 0.1
    mixup: float = 0.0
    cutmix: float = 0.0
    ema: float = 0.0
    freeze: str = ""
    unfreeze_epoch: int = 0
    start_size: int = 0
    views: str = "none"

    def __post_init__(self):
        known = {
            "optimizer": list_optimizers(),
            "loss": LOSSES,
            "class_weights": WEIGHTS,
            "views": VIEWS,
        }
        for name, words in known.items():
            _check_word(name, getattr(self, name), words)
        for name in (
            "lr",
            "weight_decay",
            "warmup_epochs",
            "mixup",
            "cutmix",
            "unfreeze_epoch",
            "start_size",
        ):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be 0 or more, got {getattr(self, name)}")
        for name in ("label_smoothing", "ema"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must lie in [0, 1), got {getattr(self, name)}")
        if not 0 < self.layer_decay <= 1:
            raise ValueError(f"layer_decay must lie in (0, 1], got {self.layer_decay}")
        if self.unfreeze_epoch and not self.freeze:
            raise ValueError(f"unfreeze_epoch={self.unfreeze_epoch} has no effect without freeze")

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

    def objective(self, scores: Tensor, targets: Tensor, weights: Tensor | None = None) -> Tensor:
        """Return what training makes small; targets are class numbers (B,) or shares of each class (B, C)."""
        return self._measure(scores, targets, weights, self.label_smoothing)

    def plain_loss(self, scores: Tensor, targets: Tensor) -> Tensor:
        """Return the same without smoothing and weights, which training and validation can be compared by.

        The targets of mixed images are as mixed as they are.
        """
        return self._measure(scores, targets, None, 0.0)

    def _measure(
        self, scores: Tensor, targets: Tensor, weights: Tensor | None, smoothing: float
    ) -> Tensor:
        weights = (
            None if weights is None else weights.to(scores.dtype)
        )  # cross_entropy takes no other
        if self.loss == "cross_entropy":
            return F.cross_entropy(scores, targets, weights, label_smoothing=smoothing)
        if targets.ndim == 1:
            targets = F.one_hot(targets, scores.shape[1])
        targets = targets.to(scores.dtype) * (1 - smoothing) + smoothing / scores.shape[1]
        return F.binary_cross_entropy_with_logits(scores, targets, weights)

    @property
    def plain(self) -> bool:
        """Whether the objective is the plain loss."""
        return not (self.label_smoothing or self.class_weights != "none")

    def scores(self, model: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
        """Return a model's scores (B, C) in float32, averaged over the views of each image."""
        scores = model(images).float()
        return (scores + model(images.flip(-1)).float()) / 2 if self.views == "flip" else scores

    def probabilities(self, scores: Tensor) -> Tensor:
        """Turn scores (B, C) into probabilities, which for "bce" do not sum to one."""
        return scores.softmax(1) if self.loss == "cross_entropy" else scores.sigmoid()

    def side(self, full: int, epoch: int, epochs: int) -> int:
        """Return the side of the training images in an epoch: a multiple of 8 pixels on the way from small to full."""
        progress = min(1.0, 1.5 * epoch / max(1, epochs))
        grown = self.start_size + (full - self.start_size) * progress
        return full if progress == 1 else min(full, max(8, 8 * round(grown / 8)))


def resized(images: Tensor, factor: float) -> Tensor:
    """Shrink a batch of images, antialiased."""
    height, width = (max(1, round(side * factor)) for side in images.shape[-2:])
    return F.interpolate(images, (height, width), mode="bilinear", antialias=True)


def _check_word(name: str, word: str, known) -> None:
    if word not in known:
        raise ValueError(f"{name}: there is no {word!r}; {suggest(word, known)}")
