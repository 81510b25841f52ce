"""A task with a known explanation: which Greek letter is among the Korean characters, and where?"""

import os
from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageFilter, ImageOps
from torch import Tensor
from torch.utils.data import Dataset

from visattn.data.decode import read_image
from visattn.data.source import SourceOptions, SourceType
from visattn.data.stores import open_store

ARCHIVE = Path(__file__).resolve().parents[2] / "assets" / "writing_systems.zip"
# class -> number of the Greek character in the archive
TARGETS = {
    "alpha": "01",
    "theta": "08",
    "xi": "14",
    "phi": "21",
    "omega": "24",
}
LENGTHS = {"train": 6000, "val": 1000, "test": 1000}
_MIN_SIDE = 24  # below it no character can be read
_GLYPH_SHARE = 0.85  # side of a glyph in a cell
_STROKE_FILTER = 5  # pixels

BoundingBox = tuple[int, int, int, int]  # top, left, bottom, right; the last two just outside
Glyphs = list[np.ndarray]  # (height, width) uint8 each


class PlacedCharacters(Dataset):
    """Handwritten characters on white: one Greek letter, which alone gives the label.

    The image is divided into cells of a third of its shorter side. One cell holds the letter, half
    of the others a Korean character each, drawn alike for every label; each is moved at random
    within its cell. Drawers of ``val`` and ``test`` do not occur in ``train``. An image is a pure
    function of (seed, split, index).

    Args:
        split: ``train``, ``val`` or ``test``.
        image_size: (h, w), at least 24 each.
        length: number of images; None takes 6000 for train, 1000 for the others.
        seed: another seed gives other images.
        archive: path of ``writing_systems.zip``; None takes the one in this repository's
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
        if min(image_size) < _MIN_SIDE:
            raise ValueError(
                f"image_size must be at least {_MIN_SIDE} x {_MIN_SIDE} for characters to be "
                f"legible, got {tuple(image_size)}"
            )
        height, width = image_size
        self.classes = list(TARGETS)
        self.ignored: list[str] = []
        self.split = split
        self.image_size = (height, width)
        self.seed = seed
        self.with_truth = with_truth
        if length is None:
            length = LENGTHS[split]
        self.labels = np.arange(length) % len(TARGETS)
        self._cell = min(image_size) // 3
        drawers = "train" if split == "train" else "val"
        glyph_side = round(self._cell * _GLYPH_SHARE)
        self._letters, self._distractors = _glyphs(str(archive or ARCHIVE), drawers, glyph_side)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Image.Image, int] | tuple[Image.Image, int, Tensor]:
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} of {len(self)} images")
        pixels, box = self._draw(index)
        image = Image.fromarray(pixels).convert("RGB")
        label = int(self.labels[index])
        if self.with_truth:
            return image, label, self.mask(box)
        return image, label

    def image(self, index: int, long_side: int | None = None) -> Image.Image:
        """The image alone."""
        pixels, _ = self._draw(index)
        return Image.fromarray(pixels).convert("RGB")

    def name(self, index: int) -> str:
        """Split, letter and number."""
        return f"{self.split}/{self.classes[self.labels[index]]}/{index}"

    def box(self, index: int) -> BoundingBox:
        """Top, left, bottom, right of the letter; the last two just outside."""
        _, box = self._draw(index)
        return box

    def mask(self, box: BoundingBox) -> Tensor:
        """(h, w) bool, true inside the box."""
        top, left, bottom, right = box
        mask = torch.zeros(self.image_size, dtype=torch.bool)
        mask[top:bottom, left:right] = True
        return mask

    def _draw(self, index: int) -> tuple[np.ndarray, BoundingBox]:
        """The pixels (h, w) of an image, and the box of its letter."""
        split_number = list(LENGTHS).index(self.split)
        generator = np.random.default_rng([self.seed, split_number, index])
        pixels = np.full(self.image_size, 255, dtype=np.uint8)
        height, width = self.image_size
        # cells are numbered row by row
        columns = width // self._cell
        cells = generator.permutation(columns * (height // self._cell))
        letter_cell = divmod(int(cells[0]), columns)
        # half of the cells remain empty
        num_distractors = (len(cells) - 1) // 2
        for cell in cells[1 : 1 + num_distractors]:
            self._place(pixels, self._distractors, divmod(int(cell), columns), generator)
        # the letter comes last, so that the distractors cannot depend on the label
        letters = self._letters[self.labels[index]]
        box = self._place(pixels, letters, letter_cell, generator)
        return pixels, box

    def _place(
        self,
        pixels: np.ndarray,
        glyphs: Glyphs,
        cell: tuple[int, int],
        generator: np.random.Generator,
    ) -> BoundingBox:
        """Draw one of the glyphs at a random position of a cell (row, column); return its box."""
        glyph = glyphs[generator.integers(len(glyphs))]
        height, width = glyph.shape
        row, column = cell
        offset_y = int(generator.integers(self._cell - height + 1))
        offset_x = int(generator.integers(self._cell - width + 1))
        top = row * self._cell + offset_y
        left = column * self._cell + offset_x
        bottom = top + height
        right = left + width
        pixels[top:bottom, left:right] = glyph
        return top, left, bottom, right


@cache
def _glyphs(archive: str, drawers: str, side: int) -> tuple[list[Glyphs], Glyphs]:
    """Glyphs of some drawers: the letters by label, and all Korean characters."""
    store = open_store(archive, "archive")
    files, _ = store.entries()
    letters: dict[str, Glyphs] = {number: [] for number in TARGETS.values()}
    distractors = []
    for name in files:
        if not name.startswith((f"{drawers}/Greek/", f"{drawers}/Korean/")):
            continue
        image = read_image(store.read(name), name)
        glyph = _cut_out(image, side)
        if "/Korean/" in name:
            distractors.append(glyph)
        for number, glyphs in letters.items():
            if name.startswith(f"{drawers}/Greek/character{number}_"):
                glyphs.append(glyph)
    if not distractors or not all(letters.values()):
        raise ValueError(
            f"archive: {archive!r} lacks the Greek and Korean characters of writing_systems.zip"
        )
    return list(letters.values()), distractors


def _cut_out(image: Image.Image, side: int) -> np.ndarray:
    """Thicken the strokes, crop to them, and scale the longer side to ``side``."""
    # else a stroke of 3 of 105 pixels fades when the image shrinks
    grey = image.convert("L")
    thickened = grey.filter(ImageFilter.MinFilter(_STROKE_FILTER))
    strokes = ImageOps.invert(thickened).getbbox()
    image = thickened.crop(strokes)
    scale = side / max(image.size)
    width, height = (max(1, round(length * scale)) for length in image.size)
    return np.asarray(image.resize((width, height), Image.Resampling.BOX))


def _matches(options: SourceOptions) -> bool:
    return options.dataset == "synthetic"


def _list_splits(options: SourceOptions) -> dict[str, PlacedCharacters]:
    splits = {}
    for split in LENGTHS:
        splits[split] = PlacedCharacters(
            split, image_size=options.image_size, seed=options.seed, archive=options.root
        )
    return splits


SYNTHETIC = SourceType("synthetic", _matches, _list_splits, datasets=("synthetic",))
