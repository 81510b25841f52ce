"""Data sets that others' libraries hold: torchvision's by name, those of Hugging Face by `hf:NAME`."""

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from visattn.data.decode import read_image, to_eight_bit
from visattn.data.images import SPLIT_OF

# name: (class in torchvision.datasets, arguments of the training part, of the test part, attribute
# with the labels)
_BY_NAME = {"split": "train"}, {"split": "test"}
_BY_FLAG = {"train": True}, {"train": False}
TORCHVISION: dict[str, tuple[str, dict, dict, str]] = {
    "cifar10": ("CIFAR10", *_BY_FLAG, "targets"),
    "cifar100": ("CIFAR100", *_BY_FLAG, "targets"),
    "fashion_mnist": ("FashionMNIST", *_BY_FLAG, "targets"),
    "mnist": ("MNIST", *_BY_FLAG, "targets"),
    "svhn": ("SVHN", *_BY_NAME, "labels"),
    "food101": ("Food101", *_BY_NAME, "_labels"),
    "oxford_pets": ("OxfordIIITPet", {"split": "trainval"}, {"split": "test"}, "_labels"),
}


class LibraryImages:
    """One split of another library's data set; ``read(index)`` gives a file's bytes or a PIL image."""

    def __init__(self, read: Callable[[int], bytes | Image.Image], labels, classes: list[str]):
        self.read, self.classes, self.ignored = read, classes, []
        self.labels = np.asarray(labels, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, index: int) -> str:
        """Class and number, since these images have no file of their own."""
        return f"{self.classes[self.labels[index]]}/{index}"

    def image(self, index: int, long_side: int | None = None) -> Image.Image:
        """The decoded image, RGB or L."""
        name = self.name(index)
        try:
            given = self.read(index)
            if not isinstance(given, bytes):
                return to_eight_bit(given, long_side)
        except (OSError, ValueError, SyntaxError) as error:
            raise ValueError(f"cannot read image {name!r}: {error}") from error
        return read_image(given, name, long_side)


def torchvision_images(
    name: str, root: str | os.PathLike, download: bool = False
) -> dict[str, LibraryImages]:
    """The ``train`` and ``test`` parts of a torchvision data set that lies in ``root``."""
    import torchvision.datasets

    kind, train, test, labels = TORCHVISION[name]
    build: Callable = partial(getattr(torchvision.datasets, kind), str(root), download=download)
    try:
        parts = {"train": build(**train), "test": build(**test)}
    except RuntimeError as error:
        if download:
            raise
        raise FileNotFoundError(
            f"dataset: {name!r} does not lie in root {str(root)!r}; set download: true to fetch it from the network"
        ) from error
    classes = getattr(parts["train"], "classes", None) or [
        str(digit) for digit in range(10)
    ]  # SVHN names none
    return {
        part: LibraryImages(partial(_picture, data), getattr(data, labels), list(classes))
        for part, data in parts.items()
    }


def _picture(dataset, index: int) -> Image.Image:
    return dataset[index][0]


def hub_images(name: str, download: bool = False) -> dict[str, LibraryImages]:
    """The splits of a Hugging Face data set: a folder that ``save_to_disk`` wrote, or a name of the hub."""
    try:
        import datasets
    except ImportError as error:
        raise ImportError(
            f"dataset: hf:{name} needs the package datasets: pip install 'visattn[hf]'"
        ) from error

    if Path(name).is_dir():
        found = datasets.load_from_disk(name)
    else:
        found = _fetched(datasets, name, download)
    parts = dict(found) if isinstance(found, dict) else {"train": found}
    named = {SPLIT_OF[part]: rows for part, rows in parts.items() if part in SPLIT_OF}
    if "train" not in named:
        raise ValueError(f"dataset: hf:{name} has no split named train; it has {', '.join(parts)}")
    return {split: _hub_split(datasets, name, rows) for split, rows in named.items()}


def _fetched(datasets, name: str, download: bool):
    try:
        return datasets.load_dataset(
            name, download_config=datasets.DownloadConfig(local_files_only=not download)
        )
    except Exception as error:  # its dozen types for what is not there share no base
        hint = "" if download else "; set download: true to fetch it from the network"
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise FileNotFoundError(f"dataset: cannot open hf:{name} ({reason}){hint}") from error


def _hub_split(datasets, name: str, rows) -> LibraryImages:
    pictures = [
        column for column, kind in rows.features.items() if isinstance(kind, datasets.Image)
    ]
    labels = [
        column for column, kind in rows.features.items() if isinstance(kind, datasets.ClassLabel)
    ]
    if len(pictures) != 1 or len(labels) != 1:
        raise ValueError(
            f"dataset: hf:{name} must have one column of images and one of class labels; "
            f"got {pictures or 'none'} and {labels or 'none'} among {', '.join(rows.features)}"
        )
    undecoded = rows.cast_column(pictures[0], datasets.Image(decode=False))
    read = partial(_file, undecoded, pictures[0])
    return LibraryImages(read, rows[labels[0]][:], list(rows.features[labels[0]].names))


def _file(rows, column: str, index: int) -> bytes:
    entry = rows[index][column] or {}
    data, path = entry.get("bytes"), entry.get("path")
    if data is None and path is None:
        raise ValueError("its row holds no image")
    return Path(path).read_bytes() if data is None else data
