"""Albumentations behind one adapter, seeded per sample.

Albumentations 2.0.8 gives every worker process the same random state, and workers started anew the
same again each epoch (https://github.com/albumentations-team/AlbumentationsX/issues/266). Here the
state is set before each sample from (seed, epoch, index, copy), so an augmentation depends on
nothing else: not on workers, ranks, order or a resume.
"""

import math
import os
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from visattn.data.transform import Box, EvalTransform, Size, rgb

AUGMENTS = ("none", "crop", "light", "strong", "trivial")
_CROP_AREA = (0.35, 1.0)  # share of the image that a crop of random size keeps
_CROP_ASPECT = 4 / 3  # by which such a crop is at most wider or higher
_CROP_DETAIL = 1.25  # how much finer an image is decoded of which a crop is enlarged
_STRONG_ERASE = 0.25  # share of the images under strong, unless erase says otherwise
_ERASED_SIDE = (0.1, 0.4)  # share of each side
_BORDER_REPLICATE = 1  # cv2.BORDER_REPLICATE, without importing cv2

DrawKey = tuple[int, int, int]  # epoch, index and copy, as visattn.data.sampler.Draw


class TrainTransform:
    """Augment an 8-bit image and normalize it as the evaluation transform does.

    Args:
        evaluation: the deterministic transform that ``none`` equals and whose size and
            normalization all share.
        name: ``none``; ``crop``: random crop along the longer side, then a shift by up to an eighth
            of each side, which costs least (He et al. 2016 pad and crop CIFAR-10 so); ``light``:
            the same crop, rotation by at most 10 degrees, scale and shift by 10 and 8 %, shear by 5
            degrees; ``strong``: random resized crop of at least 35 % of the area, two random
            operations of fourteen (as RandAugment); ``trivial``: the crop of ``light`` and one
            random operation (as TrivialAugment).
        flip: mirror half of the images; wrong for characters, digits and anything with a left and a
            right.
        erase: share of the images that lose a rectangle of 10 to 40 % of each side to a random
            color (random erasing); None takes 0.25 for ``strong`` and 0 elsewhere.
        seed: of the run.

    Shape:
        - Input: an RGB or L image and its draw (epoch, index, copy); with ``pair`` a mask of its
          size too.
        - Output: (3, h, w) float32, a pure function of image, seed and draw; the mask (h, w),
          transformed as the image.

    Raises:
        ValueError: ``name`` is unknown or ``erase`` is no share.
    """

    def __init__(
        self,
        evaluation: EvalTransform,
        name: str = "light",
        *,
        flip: bool = False,
        erase: float | None = None,
        seed: int = 0,
    ):
        if name not in AUGMENTS:
            raise ValueError(f"augment must be one of {', '.join(AUGMENTS)}, got {name!r}")
        if erase is not None and not 0 <= erase <= 1:
            raise ValueError(f"erase must lie between 0 and 1, got {erase}")
        self.evaluation = evaluation
        self.name = name
        self.flip = flip
        self.seed = seed
        self.resized_crop = name == "strong"
        if erase is None:
            erase = _STRONG_ERASE if name == "strong" else 0.0
        self.erase = erase
        self.long_side = evaluation.long_side
        if self.resized_crop:
            self.long_side = round(evaluation.long_side * _CROP_DETAIL)
        self._pipeline: Any = None

    def apply(self, image: Image.Image, draw: DrawKey) -> Tensor:
        """8-bit image to (3, h, w) float32."""
        return self.evaluation.normalize(self.pixels(image, draw))

    def pixels(self, image: Image.Image, draw: DrawKey) -> np.ndarray:
        """8-bit image to (h, w, 3) uint8."""
        generator = self._generator(draw)
        box = self._random_box(image.size, generator)
        arrays = {"image": self._crop(image, box)}
        return self._augment(arrays, generator)["image"]

    def pair(self, image: Image.Image, mask: Image.Image, draw: DrawKey) -> tuple[Tensor, Tensor]:
        """An image and its mask, transformed alike.

        The mask keeps its values: neither colors nor erasing change it.
        """
        generator = self._generator(draw)
        box = self._random_box(image.size, generator)
        # no interpolation, which would mix the values of a mask
        nearest = Image.Resampling.NEAREST
        cropped_mask = self.evaluation.resized(mask, nearest, box)
        arrays = {
            "image": self._crop(image, box),
            "mask": np.asarray(cropped_mask),
        }
        arrays = self._augment(arrays, generator)
        pixels = self.evaluation.normalize(arrays["image"])
        return pixels, torch.from_numpy(np.array(arrays["mask"]))

    def _generator(self, draw: DrawKey) -> np.random.Generator:
        return np.random.default_rng([self.seed, *draw])

    def _random_box(self, size: Size, generator: np.random.Generator) -> Box | None:
        """What to crop from an image of ``size``; None for the center, as in validation."""
        if self.name == "none":
            return None
        return random_box(size, self.evaluation.aspect(size), self.resized_crop, generator)

    def _crop(self, image: Image.Image, box: Box | None) -> np.ndarray:
        return rgb(self.evaluation.resized(image, Image.Resampling.BILINEAR, box))

    def _augment(
        self, arrays: dict[str, np.ndarray], generator: np.random.Generator
    ) -> dict[str, np.ndarray]:
        if self.name == "none" and not self.flip and not self.erase:
            return arrays
        if self._pipeline is None:
            self._pipeline = _compose(
                self.name, self.evaluation.image_size, flip=self.flip, erase=self.erase
            )
        # albumentations draws from numpy's and from Python's generator
        seed = int(generator.integers(2**63))
        self._pipeline.set_random_state(generator, random.Random(seed))
        return self._pipeline(**arrays)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_pipeline": None}  # each process builds its own


def random_box(size: Size, aspect: float, resized: bool, generator: np.random.Generator) -> Box:
    """A random box in an image: the largest of an aspect, or with ``resized`` one of random size.

    It is cut out while the image is resized, which costs less than to resize more than is used,
    and loses less.
    """
    width, height = size
    box_width = min(width, height * aspect)
    if resized:
        limit = math.log(_CROP_ASPECT)
        # uniform in the logarithm: wider is as likely as higher
        log_change = generator.uniform(-1, 1) * limit
        aspect *= math.exp(log_change)
        area = generator.uniform(*_CROP_AREA) * width * height
        box_width = min(width, height * aspect, math.sqrt(area * aspect))
    box_height = min(height, box_width / aspect)
    margins = (width - box_width, height - box_height)
    left, top = generator.random(2) * margins
    return left, top, min(width, left + box_width), min(height, top + box_height)


def _compose(name: str, size: Size, *, flip: bool, erase: float) -> Any:
    """The albumentations pipeline of an augmentation."""
    # else its import asks the network for a newer version
    os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
    import albumentations

    pipelines: dict[str, Callable[..., list]] = {
        "none": _none,
        "crop": _crop,
        "light": _light,
        "strong": _strong,
        "trivial": _trivial,
    }
    steps = pipelines[name](albumentations, size)
    if flip:
        steps.append(albumentations.HorizontalFlip(p=0.5))
    if erase:
        steps.append(
            albumentations.CoarseDropout(
                (1, 1),
                hole_height_range=_ERASED_SIDE,
                hole_width_range=_ERASED_SIDE,
                fill="random_uniform",
                p=erase,
            )
        )
    return albumentations.Compose(steps)


# The steps of each augmentation; `a` is the module albumentations, `size` is (height, width).


def _none(a: Any, size: Size) -> list:
    return []


def _crop(a: Any, size: Size) -> list:
    """Shift by up to an eighth of each side."""
    height, width = size
    margins = (round(width / 8), round(height / 8))
    return [
        a.Pad(margins, border_mode=_BORDER_REPLICATE, p=1),
        a.RandomCrop(height, width, p=1),
    ]


def _light(a: Any, size: Size) -> list:
    affine = a.Affine(
        scale=(0.9, 1.1),
        translate_percent=(-0.08, 0.08),
        rotate=(-10, 10),
        shear=(-5, 5),
        border_mode=_BORDER_REPLICATE,
        p=1,
    )
    return [affine]


def _strong(a: Any, size: Size) -> list:
    return [a.SomeOf(_operations(a, 0.6), n=2, p=1)]


def _trivial(a: Any, size: Size) -> list:
    return [a.OneOf(_operations(a, 1.0), p=1)]


def _operations(a: Any, strength: float) -> list:
    """The fourteen operations of RandAugment (Cubuk et al. 2020), uniform up to ``strength``."""
    angle = 30 * strength  # degrees
    slope = 17 * strength  # degrees
    shift = 0.3 * strength  # of the side
    tone = 0.9 * strength
    num_bits = round(8 - 4 * strength)
    slopes = (-slope, slope)
    shifts = (-shift, shift)
    tones = (1 - tone, 1 + tone)
    fixed = (0, 0)
    motions: list[dict[str, Any]] = [
        {"rotate": (-angle, angle)},
        {"shear": {"x": slopes, "y": fixed}},
        {"shear": {"x": fixed, "y": slopes}},
        {"translate_percent": {"x": shifts, "y": fixed}},
        {"translate_percent": {"x": fixed, "y": shifts}},
    ]
    unchanged = {
        "brightness": (1, 1),
        "contrast": (1, 1),
        "saturation": (1, 1),
        "hue": (0, 0),
    }
    operations = []
    for motion in motions:
        operations.append(a.Affine(**motion, border_mode=_BORDER_REPLICATE, p=1))
    # one quantity changes at a time
    for quantity in ("brightness", "contrast", "saturation"):
        ranges = unchanged | {quantity: tones}
        operations.append(a.ColorJitter(**ranges, p=1))
    operations += [
        a.Posterize(num_bits=(num_bits, 8), p=1),
        a.Solarize(threshold_range=(1 - 0.75 * strength, 1.0), p=1),
        a.AutoContrast(p=1),
        a.Equalize(p=1),
        a.Sharpen(alpha=(0, strength), p=1),
        a.NoOp(p=1),
    ]
    return operations
