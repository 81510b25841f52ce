"""From a picture to the tensor a model takes: the one deterministic transform of validation, prediction and maps."""

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from visattn.data.decode import to_eight_bit

RESIZE = ("cover", "stretch")


def build_transform(config: dict) -> "EvalTransform":
    """The transform that :meth:`visattn.data.module.ImageData.transform_config` describes."""
    known = {"image_size", "resize", "mean", "std"}
    if set(config) != known:
        raise ValueError(f"config must have exactly the keys {sorted(known)}, got {sorted(config)}")
    return EvalTransform(
        tuple(config["image_size"]), resize=config["resize"], mean=config["mean"], std=config["std"]
    )


class EvalTransform:
    """Resize a PIL image, crop its center and normalize it.

    Args:
        image_size: (h, w) of the result.
        resize: ``cover`` keeps proportions and cuts off what overhangs, ``stretch`` keeps
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
        self, image_size: tuple[int, int], *, resize: str = "cover", mean=(0.5,) * 3, std=(0.5,) * 3
    ):
        if resize not in RESIZE:
            raise ValueError(f"resize must be one of {', '.join(RESIZE)}, got {resize!r}")
        if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
            raise ValueError(
                f"mean and std must be three numbers each, std positive; got mean={mean}, std={std}"
            )
        self.image_size, self.resize = image_size, resize
        self.long_side = 2 * max(image_size)
        self.mean, self.std = np.float32(mean) * 255, np.float32(std) * 255

    def config(self) -> dict:
        """What build_transform makes an equal one of: plain lists, numbers and strings."""
        mean, std = ((values / 255).tolist() for values in (self.mean, self.std))
        return {
            "image_size": list(self.image_size),
            "resize": self.resize,
            "mean": mean,
            "std": std,
        }

    def __call__(self, image: Image.Image) -> Tensor:
        return self.apply(to_eight_bit(image, self.long_side))

    def apply(self, image: Image.Image) -> Tensor:
        """The same for an image that is 8-bit already."""
        return self.normalize(self.pixels(image))

    def pair(self, image: Image.Image, mask: Image.Image) -> tuple[Tensor, Tensor]:
        """An 8-bit image and a mask of its size to (3, h, w) float32 and (h, w); the mask keeps its values."""
        return self.apply(image), torch.from_numpy(
            np.array(self.resized(mask, Image.Resampling.NEAREST))
        )

    def pixels(self, image: Image.Image) -> np.ndarray:
        """8-bit image to (h, w, 3) uint8."""
        return rgb(self.resized(image, Image.Resampling.BILINEAR))

    def resized(
        self, image: Image.Image, resampling: Image.Resampling, box: tuple | None = None
    ) -> Image.Image:
        """The image, or what lies in ``box`` of it, at the wanted size and in its own mode."""
        height, width = self.image_size
        # large pictures are first shrunk by whole numbers, but not masks, whose values would be
        # averaged
        gap = None if resampling == Image.Resampling.NEAREST else 3.0
        box = center_box(image.size, self.aspect(image.size)) if box is None else box
        return image.resize((width, height), resampling, box=box, reducing_gap=gap)

    def aspect(self, size: tuple[int, int]) -> float:
        """Width / height of what is taken out of a picture of ``size``."""
        height, width = self.image_size
        return width / height if self.resize == "cover" else size[0] / size[1]

    def normalize(self, pixels: np.ndarray) -> Tensor:
        """(h, w, 3) uint8 to (3, h, w) float32."""
        values = pixels.transpose(2, 0, 1).astype(np.float32, order="C")
        values -= self.mean[:, None, None]
        values /= self.std[:, None, None]
        return torch.from_numpy(values)


def measure(
    source, indices: list[int], transform: EvalTransform, *, skip: bool
) -> tuple[list[float], list[float]]:
    """Mean and standard deviation per channel over the pixels of some images, which count equally."""
    means, squares = [], []
    for index in indices:
        try:
            pixels = transform.pixels(source.image(index, transform.long_side)) / 255
        except ValueError:
            if not skip:
                raise
            continue
        means.append(pixels.mean((0, 1)))
        squares.append((pixels**2).mean((0, 1)))
    if not means:
        raise ValueError(
            f"none of {len(indices)} training images can be read, such as {source.name(indices[0])!r}"
        )
    mean = np.mean(means, axis=0)
    std = np.sqrt(np.maximum(np.mean(squares, axis=0) - mean**2, 0))
    return mean.round(5).tolist(), std.clip(1 / 255).round(
        5
    ).tolist()  # all of one color must not divide by zero


def rgb(image: Image.Image) -> np.ndarray:
    """(height, width, 3) uint8; grey is expanded only here, since it was resized as one channel."""
    return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))


def center_box(size: tuple[int, int], aspect: float) -> tuple[float, float, float, float]:
    """The largest centered box (left, top, right, bottom) of width / height = ``aspect`` in a picture of ``size``."""
    width, height = size
    box_width, box_height = min(width, height * aspect), min(height, width / aspect)
    left, top = (width - box_width) / 2, (height - box_height) / 2
    return left, top, left + box_width, top + box_height
