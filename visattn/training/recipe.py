"""Recipe: the settings of a training, and the arithmetic that depends on them alone."""

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass

import torch.nn.functional as F
from timm.optim import list_optimizers
from torch import Tensor, nn
from torchvision.transforms import v2

from visattn.names import suggest

LOSSES = ("cross_entropy", "bce")
CLASS_WEIGHTS = ("none", "balanced")
VIEWS = ("none", "flip")
NOT_NEGATIVE = (
    "lr",
    "weight_decay",
    "warmup_epochs",
    "mixup",
    "cutmix",
    "unfreeze_epoch",
    "start_size",
)


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
        optimizers = [str(name) for name in list_optimizers()]
        _check_word("optimizer", self.optimizer, optimizers)
        _check_word("loss", self.loss, LOSSES)
        _check_word("class_weights", self.class_weights, CLASS_WEIGHTS)
        _check_word("views", self.views, VIEWS)
        for name in NOT_NEGATIVE:
            value = getattr(self, name)
            if not 0 <= value < math.inf:
                raise ValueError(f"{name} must be 0 or more, got {value}")
        for name in ("label_smoothing", "ema"):
            value = getattr(self, name)
            if not 0 <= value < 1:
                raise ValueError(f"{name} must lie in [0, 1), got {value}")
        if not 0 < self.layer_decay <= 1:
            raise ValueError(f"layer_decay must lie in (0, 1], got {self.layer_decay}")
        if self.unfreeze_epoch and not self.freeze:
            raise ValueError(f"unfreeze_epoch={self.unfreeze_epoch} has no effect without freeze")

    def rate(
        self,
        step: int,
        steps: int,
        warmup: int,
    ) -> float:
        """Return the share of ``lr`` that step number ``step`` of ``steps`` uses."""
        if step < warmup:
            return (step + 1) / (warmup + 1)
        progress = min(1.0, (step - warmup) / max(1, steps - warmup))
        return 0.5 * (1 + math.cos(math.pi * progress))

    def mix(self, num_classes: int) -> nn.Module | None:
        """Return the transform that mixes a batch of images and labels, or None."""
        transforms: list[nn.Module] = []
        if self.mixup > 0:
            transforms.append(v2.MixUp(alpha=self.mixup, num_classes=num_classes))
        if self.cutmix > 0:
            transforms.append(v2.CutMix(alpha=self.cutmix, num_classes=num_classes))
        if not transforms:
            return None
        return v2.RandomChoice(transforms)

    def objective(
        self,
        scores: Tensor,
        targets: Tensor,
        weights: Tensor | None = None,
    ) -> Tensor:
        """Return the loss that training minimizes.

        Args:
            scores: (B, C).
            targets: Class numbers (B,) or shares of each class (B, C).
            weights: Of the classes, (C,).
        """
        return self._cross_entropy(scores, targets, weights, self.label_smoothing)

    def plain_loss(self, scores: Tensor, targets: Tensor) -> Tensor:
        """Return the loss without smoothing and weights, by which training and validation compare.

        The targets of mixed images stay mixed.
        """
        return self._cross_entropy(scores, targets, None, 0.0)

    def _cross_entropy(
        self,
        scores: Tensor,
        targets: Tensor,
        weights: Tensor | None,
        smoothing: float,
    ) -> Tensor:
        if weights is not None:
            weights = weights.to(scores.dtype)  # torch's cross_entropy takes no other type
        if self.loss == "cross_entropy":
            return F.cross_entropy(scores, targets, weights, label_smoothing=smoothing)
        num_classes = scores.shape[1]
        if targets.ndim == 1:
            targets = F.one_hot(targets, num_classes)  # (B,) -> (B, C)
        targets = targets.to(scores.dtype) * (1 - smoothing) + smoothing / num_classes
        return F.binary_cross_entropy_with_logits(scores, targets, weights)

    @property
    def plain(self) -> bool:
        """Whether the objective is the plain loss."""
        return self.label_smoothing == 0 and self.class_weights == "none"

    def scores(
        self,
        model: Callable[[Tensor], Tensor],
        images: Tensor,
    ) -> Tensor:
        """Return a model's scores (B, C) in float32, averaged over the views of each image."""
        scores = model(images).float()
        if self.views == "none":
            return scores
        mirrored_scores = model(images.flip(-1)).float()
        return (scores + mirrored_scores) / 2

    def probabilities(self, scores: Tensor) -> Tensor:
        """Turn scores (B, C) into probabilities, which for "bce" do not sum to one."""
        if self.loss == "cross_entropy":
            return scores.softmax(1)
        return scores.sigmoid()

    def side(
        self,
        full_size: int,
        epoch: int,
        epochs: int,
    ) -> int:
        """Return the side in pixels of an epoch's training images: a multiple of 8, or full."""
        progress = min(1.0, 1.5 * epoch / max(1, epochs))  # full after two thirds
        if progress == 1:
            return full_size
        exact_size = self.start_size + (full_size - self.start_size) * progress
        return min(full_size, max(8, 8 * round(exact_size / 8)))


def resized(images: Tensor, factor: float) -> Tensor:
    """Shrink a batch of images (B, 3, H, W), antialiased."""
    height, width = images.shape[-2:]
    size = (max(1, round(height * factor)), max(1, round(width * factor)))
    return F.interpolate(images, size, mode="bilinear", antialias=True)


def _check_word(
    name: str,
    word: str,
    known: Collection[str],
) -> None:
    if word not in known:
        raise ValueError(f"{name}: there is no {word!r}; {suggest(word, known)}")
