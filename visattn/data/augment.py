"""Albumentations behind one adapter, seeded per sample.

Albumentations 2.0.8 gives every worker process the same random state, and workers started anew the
same again each epoch (https://github.com/albumentations-team/AlbumentationsX/issues/266). Here the
state is set before each sample from (seed, epoch, index, copy), so an augmentation depends on
nothing else: not on workers, ranks, order or a resume.
"""

import math
import os
import random
from functools import partial

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from visattn.data.transform import EvalTransform, rgb

AUGMENTS = ("none", "crop", "light", "strong", "trivial")
_AREA = (0.35, 1.0)  # of the picture that a crop of random size keeps
_ERASED = 0.25  # share of the images under strong, unless erase says otherwise
_REPLICATE = 1  # cv2.BORDER_REPLICATE, without importing cv2


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
        - Output: (3, h, w) float32, a pure function of image, seed and draw; the mask (h, w), moved
          as the image.

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
        self.evaluation, self.name, self.flip, self.seed = evaluation, name, flip, seed
        self.erase = _ERASED * (name == "strong") if erase is None else erase
        self.long_side = round(
            evaluation.long_side * (1.25 if name == "strong" else 1)
        )  # a part is enlarged
        self._pipeline = None

    def apply(self, image: Image.Image, draw: tuple[int, int, int]) -> Tensor:
        """8-bit image to (3, h, w) float32."""
        return self.evaluation.normalize(self.pixels(image, draw))

    def pixels(self, image: Image.Image, draw: tuple[int, int, int]) -> np.ndarray:
        """8-bit image to (h, w, 3) uint8."""
        generator, box = self._begin(image.size, draw)
        return self._augmented({"image": self._crop(image, box)}, generator)["image"]

    def pair(
        self, image: Image.Image, mask: Image.Image, draw: tuple[int, int, int]
    ) -> tuple[Tensor, Tensor]:
        """An image and its mask, moved alike; the mask keeps its values, and no color or erasing touches it."""
        generator, box = self._begin(image.size, draw)
        values = np.asarray(self.evaluation.resized(mask, Image.Resampling.NEAREST, box))
        moved = self._augmented({"image": self._crop(image, box), "mask": values}, generator)
        return self.evaluation.normalize(moved["image"]), torch.from_numpy(np.array(moved["mask"]))

    def _begin(
        self, size: tuple[int, int], draw: tuple[int, int, int]
    ) -> tuple[np.random.Generator, tuple | None]:
        generator = np.random.default_rng([self.seed, *draw])
        if self.name == "none":
            return generator, None
        return generator, random_box(
            size, self.evaluation.aspect(size), self.name == "strong", generator
        )

    def _crop(self, image: Image.Image, box: tuple | None) -> np.ndarray:
        return rgb(self.evaluation.resized(image, Image.Resampling.BILINEAR, box))

    def _augmented(
        self, arrays: dict[str, np.ndarray], generator: np.random.Generator
    ) -> dict[str, np.ndarray]:
        if self.name == "none" and not self.flip and not self.erase:
            return arrays
        if self._pipeline is None:
            self._pipeline = _compose(
                self.name, self.evaluation.image_size, flip=self.flip, erase=self.erase
            )
        self._pipeline.set_random_state(generator, random.Random(int(generator.integers(2**63))))
        return self._pipeline(**arrays)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_pipeline": None}  # each process builds its own


def random_box(
    size: tuple[int, int], aspect: float, resized: bool, generator: np.random.Generator
) -> tuple[float, float, float, float]:
    """A box (left, top, right, bottom) somewhere in a picture: the largest of an aspect, or one of random size too.

    It is cut out while the picture is resized, which costs less than to resize more than is kept,
    and loses less.
    """
    width, height = size
    across = min(width, height * aspect)
    if resized:
        aspect *= math.exp(generator.uniform(-1, 1) * math.log(4 / 3))
        wanted = math.sqrt(generator.uniform(*_AREA) * width * height * aspect)
        across = min(width, height * aspect, wanted)
    down = min(height, across / aspect)
    left, top = generator.random(2) * (width - across, height - down)
    return left, top, min(width, left + across), min(height, top + down)


def _compose(name: str, size: tuple[int, int], *, flip: bool, erase: float):
    os.environ.setdefault(
        "NO_ALBUMENTATIONS_UPDATE", "1"
    )  # else its import asks the network for a newer version
    import albumentations

    pipelines = {
        "none": _none,
        "crop": partial(_shift, size=size),
        "light": _light,
        "strong": _strong,
        "trivial": _trivial,
    }
    steps = pipelines[name](albumentations)
    steps += [albumentations.HorizontalFlip(p=0.5)] * flip
    side = (0.1, 0.4)
    hole = {"hole_height_range": side, "hole_width_range": side, "fill": "random_uniform"}
    return albumentations.Compose(
        steps + [albumentations.CoarseDropout((1, 1), **hole, p=erase)] * bool(erase)
    )


def _none(a) -> list:
    return []


def _shift(a, size: tuple[int, int]) -> list:
    height, width = size
    return [
        a.Pad((round(width / 8), round(height / 8)), border_mode=_REPLICATE, p=1),
        a.RandomCrop(height, width, p=1),
    ]


def _light(a) -> list:
    shift = (-0.08, 0.08)
    affine = a.Affine(
        scale=(0.9, 1.1),
        translate_percent=shift,
        rotate=(-10, 10),
        shear=(-5, 5),
        border_mode=_REPLICATE,
        p=1,
    )
    return [affine]


def _strong(a) -> list:
    return [a.SomeOf(_operations(a, 0.6), n=2, p=1)]


def _trivial(a) -> list:
    return [a.OneOf(_operations(a, 1.0), p=1)]


def _operations(a, strength: float) -> list:
    """The fourteen operations of RandAugment (Cubuk et al. 2020), sizes drawn uniformly up to ``strength``."""
    turn, slope, shift, tone = 30 * strength, 17 * strength, 0.3 * strength, 0.9 * strength
    moves = [
        {"rotate": (-turn, turn)},
        {"shear": {"x": (-slope, slope), "y": (0, 0)}},
        {"shear": {"x": (0, 0), "y": (-slope, slope)}},
        {"translate_percent": {"x": (-shift, shift), "y": (0, 0)}},
        {"translate_percent": {"x": (0, 0), "y": (-shift, shift)}},
    ]
    still = {"brightness": (1, 1), "contrast": (1, 1), "saturation": (1, 1), "hue": (0, 0)}
    tones = [
        still | {which: (1 - tone, 1 + tone)} for which in ("brightness", "contrast", "saturation")
    ]
    return [
        *[a.Affine(**move, border_mode=_REPLICATE, p=1) for move in moves],
        *[a.ColorJitter(**change, p=1) for change in tones],
        a.Posterize(num_bits=(round(8 - 4 * strength), 8), p=1),
        a.Solarize(threshold_range=(1 - 0.75 * strength, 1.0), p=1),
        a.AutoContrast(p=1),
        a.Equalize(p=1),
        a.Sharpen(alpha=(0, strength), p=1),
        a.NoOp(p=1),
    ]
