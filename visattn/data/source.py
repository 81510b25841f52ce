"""What a source of labeled images is, and what describes a type of source."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from PIL import Image

# a word in a path, a table or a data set -> the split that it means
SPLIT_OF = {
    "train": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
}


class ImageSource(Protocol):
    """The labeled images of one split.

    ``labels`` is (N,) class numbers, or (N, C) of 0 and 1 where an image may have several classes;
    ``ignored`` lists the files that are not used.
    """

    labels: np.ndarray
    classes: list[str]
    ignored: list[str]

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """What messages call the image."""

    def image(self, index: int, long_side: int | None = None) -> Image.Image:
        """The decoded image, RGB or L; a JPEG may be decoded no finer than ``long_side`` needs."""


@dataclass(frozen=True)
class SourceOptions:
    """The arguments of ImageData that select a source; see there."""

    root: str | None
    dataset: str | None
    labels: str | None
    download: bool
    image_size: tuple[int, int]
    seed: int

    def require_root(self) -> str:
        """The root of a source that cannot do without one."""
        if self.root is None:
            raise ValueError("root: this source needs a folder, a zip or a URL, got None")
        return self.root


@dataclass(frozen=True)
class SourceType:
    """One row of SOURCE_TYPES: which arguments select it, and how its splits are listed.

    Args:
        name: what the type is called.
        matches: whether the arguments select this type.
        list_splits: the sources by split; ``train`` among them.
        datasets: values of the argument ``dataset`` that select it, as messages list them.
        download: fetch what is missing, once per machine; None where nothing is to fetch.
    """

    name: str
    matches: Callable[[SourceOptions], bool]
    list_splits: Callable[[SourceOptions], Mapping[str, ImageSource]]
    datasets: tuple[str, ...] = ()
    download: Callable[[SourceOptions], object] | None = None
