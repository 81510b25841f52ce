"""A task whose true explanation is known: which Greek letter stands among the Korean characters, and where?"""

import os
from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageFilter, ImageOps
from torch import Tensor
from torch.utils.data import Dataset

from visattn.data.decode import read_image
from visattn.data.stores import open_store

ARCHIVE = Path(__file__).resolve().parents[2] / "assets" / "writing_systems.zip"
TARGETS = {
    "alpha": "01",
    "theta": "08",
    "xi": "14",
    "phi": "21",
    "omega": "24",
}  # number of the Greek character
LENGTHS = {"train": 6000, "val": 1000, "test": 1000}


class PlacedCharacters(Dataset):
    """Handwritten characters on a white ground: one Greek letter, which alone decides the label, among Korean ones.

    The picture is divided into cells of a third of its shorter side. One takes the letter, half of
    the others a Korean character each, drawn alike for every label; each is moved at random within
    its cell. Drawers of ``val`` and ``test`` do not occur in ``train``. An image is a pure function
    of (seed, split, index).

    Args:
        split: ``train``, ``val`` or ``test``.
        image_size: (h, w), at least 24 each.
        length: number of images; None takes 6000 for train, 1000 for the others.
        seed: another seed gives other images.
        archive: where ``writing_systems.zip`` lies; None takes the one in this repository's
            ``assets``.
        with_truth: items are (image, label, mask) instead of (image, label).

    Shape:
        - Item: PIL image of (h, w), int label, and on request a bool mask (h, w), true in the
          letter's bounding box.

    Raises:
        ValueError: ``split`` is unknown or ``image_size`` too small.
        FileNotFoundError: the archive is not there.

    Example:
        >>> image, label, mask = PlacedCharacters("val", image_size=(48, 64), with_truth=True)[7]
        >>> image.size, label, mask.shape
        ((64, 48), 2, torch.Size([48, 64]))
    """

    def __init__(
        self,
        split: str = "train",
        *,
        image_size: tuple[int, int] = (64, 64),
        length: int | None = None,
        seed: int = 0,
        archive: str | os.PathLike | None = None,
        with_truth: bool = False,
    ):
        if split not in LENGTHS:
            raise ValueError(f"split must be one of {', '.join(LENGTHS)}, got {split!r}")
        if min(image_size) < 24:
            raise ValueError(
                f"image_size must be at least 24 x 24 for characters to be legible, got {tuple(image_size)}"
            )
        self.classes, self.ignored = list(TARGETS), []
        self.split, self.image_size, self.seed, self.with_truth = (
            split,
            tuple(image_size),
            seed,
            with_truth,
        )
        self.labels = np.arange(LENGTHS[split] if length is None else length) % len(TARGETS)
        self._cell = min(image_size) // 3
        drawers = "train" if split == "train" else "val"
        self._letters, self._others = _glyphs(
            str(archive or ARCHIVE), drawers, round(self._cell * 0.85)
        )

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Image.Image, int] | tuple[Image.Image, int, Tensor]:
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} of {len(self)} images")
        pixels, box = self._draw(index)
        item = Image.fromarray(pixels).convert("RGB"), int(self.labels[index])
        return (*item, self.mask(box)) if self.with_truth else item

    def image(self, index: int, long_side: int | None = None) -> Image.Image:
        """The picture alone."""
        return Image.fromarray(self._draw(index)[0]).convert("RGB")

    def name(self, index: int) -> str:
        """Split, letter and number."""
        return f"{self.split}/{self.classes[self.labels[index]]}/{index}"

    def box(self, index: int) -> tuple[int, int, int, int]:
        """Top, left, bottom, right of the letter; the last two just outside."""
        return self._draw(index)[1]

    def mask(self, box: tuple[int, int, int, int]) -> Tensor:
        """(h, w) bool, true inside the box."""
        top, left, bottom, right = box
        mask = torch.zeros(self.image_size, dtype=torch.bool)
        mask[top:bottom, left:right] = True
        return mask

    def _draw(self, index: int) -> tuple[np.ndarray, tuple[int, int, int, int]]:
        generator = np.random.default_rng([self.seed, list(LENGTHS).index(self.split), index])
        pixels = np.full(self.image_size, 255, dtype=np.uint8)
        columns = self.image_size[1] // self._cell
        cells = generator.permutation(columns * (self.image_size[0] // self._cell))
        for cell in cells[1 : 1 + (len(cells) - 1) // 2]:
            self._place(pixels, self._others, divmod(int(cell), columns), generator)
        # last, so that the others cannot depend on the label
        return pixels, self._place(
            pixels, self._letters[self.labels[index]], divmod(int(cells[0]), columns), generator
        )

    def _place(
        self, pixels: np.ndarray, glyphs: list[np.ndarray], cell: tuple[int, int], generator
    ) -> tuple:
        """Draw one of the glyphs somewhere in a cell and return its box."""
        glyph = glyphs[generator.integers(len(glyphs))]
        height, width = glyph.shape
        top = cell[0] * self._cell + int(generator.integers(self._cell - height + 1))
        left = cell[1] * self._cell + int(generator.integers(self._cell - width + 1))
        pixels[top : top + height, left : left + width] = glyph
        return top, left, top + height, left + width


@cache
def _glyphs(
    archive: str, drawers: str, side: int
) -> tuple[list[list[np.ndarray]], list[np.ndarray]]:
    """Cut-out characters of some drawers: the letters by label, and all Korean ones."""
    store = open_store(archive, "archive")
    names = [
        name
        for name in store.entries()[0]
        if name.startswith((f"{drawers}/Greek/", f"{drawers}/Korean/"))
    ]
    cut = {name: _cut_out(read_image(store.read(name), name), side) for name in names}
    letters = [
        [
            glyph
            for name, glyph in cut.items()
            if name.startswith(f"{drawers}/Greek/character{number}_")
        ]
        for number in TARGETS.values()
    ]
    others = [glyph for name, glyph in cut.items() if "/Korean/" in name]
    if not others or not all(letters):
        raise ValueError(
            f"archive: {archive!r} lacks the Greek and Korean characters of writing_systems.zip"
        )
    return letters, others


def _cut_out(image: Image.Image, side: int) -> np.ndarray:
    """Thicken the strokes, crop to them, and scale the longer side to ``side``."""
    image = image.convert("L").filter(
        ImageFilter.MinFilter(5)
    )  # else a stroke of 3 of 105 pixels fades when shrunk
    image = image.crop(ImageOps.invert(image).getbbox())
    scale = side / max(image.size)
    return np.asarray(
        image.resize([max(1, round(length * scale)) for length in image.size], Image.Resampling.BOX)
    )
