"""The deterministic transform of validation, prediction and maps: an image to a model's input."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from visattn.data.decode import to_eight_bit
from visattn.data.source import ImageSource

RESIZE = ("cover", "stretch")
_CONFIG_KEYS = {"image_size", "resize", "mean", "std"}
_SHRINK_GAP = 3.0  # how much larger than the result an image must remain when shrunk in whole steps

Size = tuple[int, int]  # of an image (width, height), of a tensor (height, width)
Box = tuple[float, float, float, float]  # left, top, right, bottom in pixels


def build_transform(config: dict[str, Any]) -> "EvalTransform":
    """The transform that :meth:`visattn.data.module.ImageData.transform_config` describes."""
    if set(config) != _CONFIG_KEYS:
        raise ValueError(
            f"config must have exactly the keys {sorted(_CONFIG_KEYS)}, got {sorted(config)}"
        )
    height, width = config["image_size"]
    return EvalTransform(
        (height, width),
        resize=config["resize"],
        mean=config["mean"],
        std=config["std"],
    )


class EvalTransform:
    """Resize a PIL image, crop its center and normalize it.

    Args:
        image_size: (h, w) of the result.
        resize: ``cover`` keeps proportions and cuts off what exceeds the image, ``stretch`` keeps
            everything and distorts.
        mean: per channel, of values in [0, 1].
        std: per channel, of values in [0, 1].

    Shape:
        - Input: a PIL image of any mode and size from 1 x 1 up.
        - Output: (3, h, w) float32, ``(value - mean) / std``.

    Raises:
        ValueError: ``resize`` is unknown, ``std`` is not positive, or the image is a decompression
            bomb.

    Example:
        >>> transform = EvalTransform((5, 7), mean=[0.5] * 3, std=[0.5] * 3)
        >>> transform(Image.new("L", (31, 17), 255)).unique()
        tensor([1.])
    """

    def __init__(
        self,
        image_size: Size,
        *,
        resize: str = "cover",
        mean: Sequence[float] = (0.5, 0.5, 0.5),
        std: Sequence[float] = (0.5, 0.5, 0.5),
    ):
        if resize not in RESIZE:
            raise ValueError(f"resize must be one of {', '.join(RESIZE)}, got {resize!r}")
        if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
            raise ValueError(
                f"mean and std must be three numbers each, std positive; got mean={mean}, std={std}"
            )
        self.image_size = image_size
        self.resize = resize
        self.long_side = 2 * max(image_size)
        # for values of 0 to 255
        self.mean = np.asarray(mean, np.float32) * 255
        self.std = np.asarray(std, np.float32) * 255

    def config(self) -> dict[str, Any]:
        """What build_transform needs to repeat this transform: plain lists, numbers and strings."""
        return {
            "image_size": list(self.image_size),
            "resize": self.resize,
            "mean": (self.mean / 255).tolist(),
            "std": (self.std / 255).tolist(),
        }

    def __call__(self, image: Image.Image) -> Tensor:
        return self.apply(to_eight_bit(image, self.long_side))

    def apply(self, image: Image.Image) -> Tensor:
        """An image that is 8-bit already to (3, h, w) float32."""
        return self.normalize(self.pixels(image))

    def pair(self, image: Image.Image, mask: Image.Image) -> tuple[Tensor, Tensor]:
        """An 8-bit image and a mask of its size to (3, h, w) float32 and (h, w).

        The mask keeps its values.
        """
        values = np.array(self.resized(mask, Image.Resampling.NEAREST))
        return self.apply(image), torch.from_numpy(values)

    def pixels(self, image: Image.Image) -> np.ndarray:
        """8-bit image to (h, w, 3) uint8."""
        return rgb(self.resized(image, Image.Resampling.BILINEAR))

    def resized(
        self, image: Image.Image, resampling: Image.Resampling, box: Box | None = None
    ) -> Image.Image:
        """The image, or what is in ``box``, at the size ``image_size`` and in its own mode."""
        height, width = self.image_size
        # large images are first shrunk by whole numbers, but not masks, whose values would be
        # averaged
        gap = None if resampling == Image.Resampling.NEAREST else _SHRINK_GAP
        if box is None:
            aspect = self.aspect(image.size)
            box = center_box(image.size, aspect)
        return image.resize((width, height), resampling, box=box, reducing_gap=gap)

    def aspect(self, size: Size) -> float:
        """Width / height of the crop from an image of ``size`` (width, height)."""
        if self.resize == "cover":
            height, width = self.image_size
        else:
            width, height = size
        return width / height

    def normalize(self, pixels: np.ndarray) -> Tensor:
        """(h, w, 3) uint8 to (3, h, w) float32."""
        # (h, w, 3) -> (3, h, w)
        values = pixels.transpose(2, 0, 1).astype(np.float32, order="C")
        values -= self.mean[:, None, None]
        values /= self.std[:, None, None]
        return torch.from_numpy(values)


def measure(
    source: ImageSource, indices: list[int], transform: EvalTransform, *, skip: bool
) -> tuple[list[float], list[float]]:
    """Mean and standard deviation per channel over the pixels of images that count equally."""
    means = []
    mean_squares = []
    for index in indices:
        try:
            pixels = transform.pixels(source.image(index, transform.long_side)) / 255
        except ValueError:
            if not skip:
                raise
            continue
        # (h, w, 3) -> (3,)
        means.append(pixels.mean((0, 1)))
        mean_squares.append((pixels**2).mean((0, 1)))
    if not means:
        first = source.name(indices[0])
        raise ValueError(f"none of {len(indices)} training images can be read, such as {first!r}")
    mean = np.mean(means, axis=0)
    variance = np.mean(mean_squares, axis=0) - mean**2
    std = np.sqrt(np.maximum(variance, 0))
    std = std.clip(1 / 255)  # images of one color must not lead to a division by zero
    return mean.round(5).tolist(), std.round(5).tolist()


def rgb(image: Image.Image) -> np.ndarray:
    """(height, width, 3) uint8; grey is expanded only here, since it was resized as one channel."""
    return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))


def center_box(size: Size, aspect: float) -> Box:
    """The largest centered box of width / height = ``aspect`` in an image of ``size``."""
    width, height = size
    box_width = min(width, height * aspect)
    box_height = min(height, width / aspect)
    left = (width - box_width) / 2
    top = (height - box_height) / 2
    return left, top, left + box_width, top + box_height
