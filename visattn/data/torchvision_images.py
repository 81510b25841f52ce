"""Data sets of torchvision, by name."""

import os
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from PIL import Image

from visattn.data.library_images import LibraryImages
from visattn.data.source import SourceOptions, SourceType


class TorchvisionEntry(NamedTuple):
    """A class of torchvision.datasets, arguments for each split, attribute with the labels."""

    class_name: str
    train: dict[str, Any]
    test: dict[str, Any]
    labels: str = "targets"


# some classes name their splits, some have a flag
_BY_NAME = ({"split": "train"}, {"split": "test"})
_BY_FLAG = ({"train": True}, {"train": False})
TORCHVISION_DATASETS = {
    "cifar10": TorchvisionEntry("CIFAR10", *_BY_FLAG),
    "cifar100": TorchvisionEntry("CIFAR100", *_BY_FLAG),
    "fashion_mnist": TorchvisionEntry("FashionMNIST", *_BY_FLAG),
    "mnist": TorchvisionEntry("MNIST", *_BY_FLAG),
    "svhn": TorchvisionEntry("SVHN", *_BY_NAME, "labels"),
    "food101": TorchvisionEntry("Food101", *_BY_NAME, "_labels"),
    "oxford_pets": TorchvisionEntry(
        "OxfordIIITPet", {"split": "trainval"}, {"split": "test"}, "_labels"
    ),
}


def torchvision_images(
    name: str, root: str | os.PathLike, download: bool = False
) -> dict[str, LibraryImages]:
    """The splits ``train`` and ``test`` of a torchvision data set whose files are in ``root``."""
    import torchvision.datasets

    entry = TORCHVISION_DATASETS[name]
    dataset_class = getattr(torchvision.datasets, entry.class_name)
    build: Callable = partial(dataset_class, str(root), download=download)
    try:
        datasets = {
            "train": build(**entry.train),
            "test": build(**entry.test),
        }
    except RuntimeError as error:
        if download:
            raise
        raise FileNotFoundError(
            f"dataset: {name!r} is not in root {str(root)!r}; "
            "set download: true to fetch it from the network"
        ) from error
    classes = getattr(datasets["train"], "classes", None)
    if not classes:  # SVHN names none
        classes = [str(digit) for digit in range(10)]
    splits = {}
    for split, dataset in datasets.items():
        read = partial(_read_picture, dataset)
        labels = getattr(dataset, entry.labels)
        splits[split] = LibraryImages(read, labels, list(classes))
    return splits


def _read_picture(dataset: Any, index: int) -> Image.Image:
    image, _ = dataset[index]
    return image


def _matches(options: SourceOptions) -> bool:
    return options.dataset in TORCHVISION_DATASETS


def _list_splits(options: SourceOptions, download: bool = False) -> dict[str, LibraryImages]:
    name = str(options.dataset)
    root = options.root or os.path.join("data", name)
    return torchvision_images(name, root, download)


TORCHVISION = SourceType(
    "torchvision",
    _matches,
    _list_splits,
    datasets=tuple(TORCHVISION_DATASETS),
    download=partial(_list_splits, download=True),
)
