"""Where images come from: folders, zip files, torchvision. A source is an indexed list of labeled, undecoded files."""

import os
import zipfile
from collections.abc import Callable, Iterable
from difflib import get_close_matches
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from visattn.data.decode import read_image, to_eight_bit

EXTENSIONS = frozenset(".avif .bmp .gif .jfif .jp2 .jpeg .jpg .pbm .pgm .png .ppm .tif .tiff .webp".split())
_SPLIT_OF = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
_JUNK = frozenset({"__macosx", "thumbs.db", "desktop.ini"})


class Folder:
    """The files below a folder."""

    def __init__(self, path: Path):
        self.path = path

    def entries(self) -> tuple[list[str], list[str]]:
        """Relative paths of all files and of all folders, sorted, junk of operating systems left out."""
        files, folders = [], []
        waiting = [""]
        while waiting:
            prefix = waiting.pop()
            with os.scandir(self.path / prefix) as found:
                for entry in found:
                    if _is_junk(entry.name):
                        continue
                    if entry.is_dir():
                        waiting.append(f"{prefix}{entry.name}/")
                        folders.append(f"{prefix}{entry.name}")
                    else:
                        files.append(prefix + entry.name)
        return sorted(files), sorted(folders)

    def read(self, name: str) -> bytes:
        return (self.path / name).read_bytes()


class Archive:
    """The files inside a zip; every process opens its own handle, since a shared one corrupts reads."""

    def __init__(self, path: Path):
        self.path = path
        self._handle, self._process = None, None

    def entries(self) -> tuple[list[str], list[str]]:
        """Relative paths of all files and of all folders, sorted, junk of operating systems left out."""
        try:
            with zipfile.ZipFile(self.path) as archive:
                names = archive.namelist()
        except zipfile.BadZipFile as error:
            raise ValueError(f"{str(self.path)!r} is not a readable zip file ({error})") from error
        names = [name for name in names if not any(map(_is_junk, name.rstrip("/").split("/")))]
        files = [name for name in names if not name.endswith("/")]
        folders = {name.rstrip("/") for name in names if name.endswith("/")}
        for parent in {name.rpartition("/")[0] for name in files}:
            while parent:
                folders.add(parent)
                parent = parent.rpartition("/")[0]
        return sorted(files), sorted(folders)

    def read(self, name: str) -> bytes:
        if self._process != os.getpid():
            self._handle, self._process = zipfile.ZipFile(self.path), os.getpid()
        return self._handle.read(name)

    def __getstate__(self) -> dict:
        return {"path": self.path, "_handle": None, "_process": None}


class Names:
    """Many strings as one block of bytes: a million file names cost their letters, and workers share them."""

    def __init__(self, names: Iterable[str]):
        encoded = [name.encode("utf-8", "surrogateescape") for name in names]
        self._bytes = b"".join(encoded)
        self._ends = np.cumsum([0, *map(len, encoded)])

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> str:
        return self._bytes[self._ends[index] : self._ends[index + 1]].decode("utf-8", "surrogateescape")


class FileImages:
    """Image files of a folder or zip, each with the index of its class."""

    def __init__(self, store: Folder | Archive, names: Iterable[str], labels, classes: list[str], ignored=()):
        self.store, self.names, self.classes, self.ignored = store, Names(names), classes, list(ignored)
        self.labels = np.asarray(labels, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.names)

    def name(self, index: int) -> str:
        """The file's path within the root."""
        return self.names[index]

    def image(self, index: int, long_side: int | None = None) -> Image.Image:
        """The decoded file, RGB or L."""
        name = self.names[index]
        try:
            data = self.store.read(name)
        except (
            OSError,
            zipfile.BadZipFile,
            RuntimeError,
            NotImplementedError,
        ) as error:  # encrypted zips too
            raise ValueError(f"cannot read image {name!r}: {error}") from error
        return read_image(data, name, long_side)


class TorchvisionImages:
    """One split of a torchvision data set."""

    def __init__(self, dataset, labels, classes: list[str]):
        self.dataset, self.classes, self.ignored = dataset, classes, []
        self.labels = np.asarray(labels, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, index: int) -> str:
        """Class and number, since these images have no file of their own."""
        return f"{self.classes[self.labels[index]]}/{index}"

    def image(self, index: int, long_side: int | None = None) -> Image.Image:
        """The decoded image, RGB or L."""
        try:
            return to_eight_bit(self.dataset[index][0], long_side)
        except (OSError, ValueError, SyntaxError) as error:
            raise ValueError(f"cannot read image {self.name(index)!r}: {error}") from error


Source = FileImages | TorchvisionImages


def open_store(root: str | os.PathLike, argument: str = "root") -> Folder | Archive:
    """The folder or zip file at ``root``; an error names the argument that was wrong."""
    path = Path(root)
    if path.is_dir():
        return Folder(path)
    if path.is_file():
        return Archive(path)
    beside = os.listdir(path.parent) if path.parent.is_dir() else []
    near = get_close_matches(path.name, beside, n=1)
    hint = f"; did you mean {str(path.parent / near[0])!r}?" if near else ""
    raise FileNotFoundError(f"{argument}: there is no folder or zip file {str(path)!r}{hint}")


def list_images(root: str | os.PathLike, argument: str = "predict_root") -> FileImages:
    """Every image below ``root`` (a folder, a zip or one picture), without classes."""
    path = Path(root)
    if path.is_file() and path.suffix.lower() in EXTENSIONS:
        return FileImages(Folder(path.parent), [path.name], [0], [])
    store = open_store(path, argument)
    files, _ = store.entries()
    images = [name for name in files if _is_image(name)]
    if not images:
        raise ValueError(f"{argument}: {str(root)!r} holds no image ({len(files)} other files)")
    return FileImages(store, images, np.zeros(len(images)), [], [name for name in files if not _is_image(name)])


def list_classes(root: str | os.PathLike) -> dict[str, FileImages]:
    """Splits of a folder or zip of class folders: ``train`` and where they exist ``val`` and ``test``."""
    store = open_store(root)
    files, folders = store.entries()
    top = _innermost(folders)
    below = {name[len(top) :] for name in folders if name.startswith(top)}
    if not any(name.startswith("train/") for name in below):
        outer = {name for name in below if "/" not in name}
        if outer and outer <= _SPLIT_OF.keys():
            raise ValueError(f"root: {str(root)!r} has {sorted(outer)} but no train/ with class folders in it")
        return {"train": _one_split(store, top, files, folders)}
    found = {
        split: _one_split(store, f"{top}{name}/", files, folders) for name, split in _SPLIT_OF.items() if name in below
    }
    for split, images in found.items():
        _compare_classes(str(root), split, found["train"].classes, images.classes)
    return found


def _innermost(folders: list[str]) -> str:
    """The prefix of a lone outer folder, as zips have it; empty where there is none."""
    top = ""
    while True:
        inside = [name for name in folders if name.startswith(top) and "/" not in name[len(top) :]]
        if len(inside) != 1 or inside[0][len(top) :] in _SPLIT_OF:
            return top
        deeper = f"{inside[0]}/"
        if not any(name.startswith(deeper) for name in folders):
            return top
        top = deeper


def _one_split(store: Folder | Archive, prefix: str, files: list[str], folders: list[str]) -> FileImages:
    where = f"{str(store.path)!r}" + (f", {prefix}" if prefix else "")
    below = [name[len(prefix) :] for name in folders if name.startswith(prefix)]
    classes = [name for name in below if "/" not in name]
    index = {name: number for number, name in enumerate(classes)}
    names, labels, ignored = [], [], []
    for name in files:
        if not name.startswith(prefix):
            continue
        label, is_image = index.get(name[len(prefix) :].partition("/")[0]), _is_image(name)
        if label is not None and is_image:
            names.append(name)
            labels.append(label)
        elif label is not None or is_image:  # not what lies beside the classes, such as a licence
            ignored.append(name)
    if len(classes) < 2:
        raise ValueError(
            f"root: {where} must hold at least two class folders with images, or train/ and val/ with class folders in "
            f"them; got {classes or 'none'}" + (f" and {len(ignored)} files outside" if ignored else "")
        )
    empty = [classes[number] for number in np.flatnonzero(np.bincount(labels, minlength=len(classes)) == 0)]
    if empty:
        raise ValueError(f"root: {where} has class folders without an image: {', '.join(empty)}")
    return FileImages(store, names, labels, classes, ignored)


def _compare_classes(root: str, split: str, train: list[str], other: list[str]) -> None:
    missing, extra = sorted(set(train) - set(other)), sorted(set(other) - set(train))
    if missing or extra:
        sides = f"only in train/ {missing or 'none'}, only in {split}/ {extra or 'none'}"
        raise ValueError(f"root: {root!r}: train/ and {split}/ have different classes: {sides}")


def _is_junk(name: str) -> bool:
    return name.startswith(".") or name.lower() in _JUNK


def _is_image(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in EXTENSIONS


# name: (class in torchvision.datasets, arguments of the training part, of the test part, attribute with the labels)
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


def torchvision_images(name: str, root: str | os.PathLike, download: bool = False) -> dict[str, TorchvisionImages]:
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
    classes = getattr(parts["train"], "classes", None) or [str(digit) for digit in range(10)]  # SVHN names none
    return {part: TorchvisionImages(data, getattr(data, labels), list(classes)) for part, data in parts.items()}


def split_stratified(labels: np.ndarray, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices of two parts; the second holds ``fraction`` of each class, at least one image of it if it has two."""
    if not 0 < fraction < 1:
        raise ValueError(f"val_fraction must lie between 0 and 1, got {fraction}")
    rest, held = [], []
    for label in np.unique(labels):
        members = np.random.default_rng([seed, label]).permutation(np.flatnonzero(labels == label))
        count = min(max(1, round(len(members) * fraction)), len(members) - 1)
        held.append(members[:count])
        rest.append(members[count:])
    if not sum(map(len, held)):
        raise ValueError("root: a class needs two images or more, one of them for validation; all classes have one")
    return np.sort(np.concatenate(rest)), np.sort(np.concatenate(held))
