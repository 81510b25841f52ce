"""Images of a folder or zip: an indexed list of labeled, undecoded files, with classes named by folders."""

import os
import zipfile
import zlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image

from visattn.data.decode import read_image
from visattn.data.stores import Archive, Folder, open_store

EXTENSIONS = frozenset(
    ".avif .bmp .gif .jfif .jp2 .jpeg .jpg .pbm .pgm .png .ppm .tif .tiff .webp".split()
)
# what a store raises for a file that is lost, cut, garbled or encrypted
UNREADABLE = (OSError, EOFError, zipfile.BadZipFile, zlib.error, RuntimeError, NotImplementedError)
SPLIT_OF = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}


class Names:
    """Many strings as one block of bytes: a million file names cost their letters, and workers share them."""

    def __init__(self, names: Iterable[str]):
        encoded = [name.encode("utf-8", "surrogateescape") for name in names]
        self.block, self.ends = b"".join(encoded), np.cumsum([0, *map(len, encoded)])

    @classmethod
    def of_block(cls, block: bytes, ends: np.ndarray) -> "Names":
        """The names that another's ``block`` and ``ends`` hold."""
        names = cls(())
        names.block, names.ends = block, ends
        return names

    def __len__(self) -> int:
        return len(self.ends) - 1

    def __getitem__(self, index: int) -> str:
        return self.block[self.ends[index] : self.ends[index + 1]].decode(
            "utf-8", "surrogateescape"
        )


class FileImages:
    """Image files of a folder or zip, each with the index of its class, or a row of 0 and 1 for every class."""

    def __init__(
        self, store: Folder | Archive, names: Iterable[str], labels, classes: list[str], ignored=()
    ):
        self.store, self.names, self.classes, self.ignored = (
            store,
            Names(names),
            classes,
            list(ignored),
        )
        self.labels = np.asarray(labels)

    def __len__(self) -> int:
        return len(self.names)

    def name(self, index: int) -> str:
        """The file's path within the root."""
        return self.names[index]

    def data(self, index: int) -> bytes:
        """The undecoded file."""
        name = self.names[index]
        try:
            return self.store.read(name)
        except UNREADABLE as error:
            raise ValueError(f"cannot read image {name!r}: {error}") from error

    def image(self, index: int, long_side: int | None = None) -> Image.Image:
        """The decoded file, RGB or L."""
        return read_image(self.data(index), self.names[index], long_side)


def list_images(root: str | os.PathLike, argument: str = "predict_root") -> FileImages:
    """Every image below ``root`` (a folder, a zip or one picture), without classes."""
    path = Path(root)
    if path.is_file() and path.suffix.lower() in EXTENSIONS:
        return FileImages(Folder(path.parent), [path.name], [0], [])
    store = open_store(path, argument)
    files, _ = store.entries()
    images = [name for name in files if is_image(name)]
    if not images:
        raise ValueError(f"{argument}: {str(root)!r} holds no image ({len(files)} other files)")
    labels = np.zeros(len(images), dtype=np.int64)
    return FileImages(store, images, labels, [], [name for name in files if not is_image(name)])


def list_classes(root: str | os.PathLike) -> dict[str, FileImages]:
    """Splits of a folder or zip of class folders: ``train`` and where they exist ``val`` and ``test``."""
    store = open_store(root)
    files, folders = store.entries()
    top = _innermost(folders)
    below = {name[len(top) :] for name in folders if name.startswith(top)}
    if not any(name.startswith("train/") for name in below):
        outer = {name for name in below if "/" not in name}
        if outer and outer <= SPLIT_OF.keys():
            raise ValueError(
                f"root: {str(root)!r} has {sorted(outer)} but no train/ with class folders in it"
            )
        return {"train": _one_split(store, top, files, folders)}
    found = {
        split: _one_split(store, f"{top}{name}/", files, folders)
        for name, split in SPLIT_OF.items()
        if name in below
    }
    for split, images in found.items():
        _compare_classes(str(root), split, found["train"].classes, images.classes)
    return found


def is_image(name: str) -> bool:
    """Say whether the name ends as those of images do."""
    return os.path.splitext(name)[1].lower() in EXTENSIONS


def _innermost(folders: list[str]) -> str:
    """The prefix of a lone outer folder, as zips have it; empty where there is none."""
    top = ""
    while True:
        inside = [name for name in folders if name.startswith(top) and "/" not in name[len(top) :]]
        if len(inside) != 1 or inside[0][len(top) :] in SPLIT_OF:
            return top
        deeper = f"{inside[0]}/"
        if not any(name.startswith(deeper) for name in folders):
            return top
        top = deeper


def _one_split(
    store: Folder | Archive, prefix: str, files: list[str], folders: list[str]
) -> FileImages:
    where = f"{str(store.path)!r}" + (f", {prefix}" if prefix else "")
    below = [name[len(prefix) :] for name in folders if name.startswith(prefix)]
    classes = [name for name in below if "/" not in name]
    names, labels, ignored = _labeled(files, prefix, classes)
    if len(classes) < 2:
        raise ValueError(
            f"root: {where} must hold at least two class folders with images, or train/ and val/ with class folders in "
            f"them; got {classes or 'none'}"
            + (f" and {len(ignored)} files outside" if ignored else "")
            + _zips(files)
        )
    empty = [
        classes[number]
        for number in np.flatnonzero(np.bincount(labels, minlength=len(classes)) == 0)
    ]
    if empty:
        raise ValueError(f"root: {where} has class folders without an image: {', '.join(empty)}")
    return FileImages(store, names, np.asarray(labels, dtype=np.int64), classes, ignored)


def _zips(files: list[str]) -> str:
    zips = [name for name in files if name.lower().endswith(".zip")]
    return f"; unzip {', '.join(zips[:3])} there, or give one of them" if zips else ""


def _labeled(
    files: list[str], prefix: str, classes: list[str]
) -> tuple[list[str], list[int], list[str]]:
    """Names and class numbers of the images below ``prefix``, and the files that are none or of no class."""
    index = {name: number for number, name in enumerate(classes)}
    names, labels, ignored = [], [], []
    for name in files:
        if not name.startswith(prefix):
            continue
        label, picture = index.get(name[len(prefix) :].partition("/")[0]), is_image(name)
        if label is not None and picture:
            names.append(name)
            labels.append(label)
        elif label is not None or picture:  # not what lies beside the classes, such as a licence
            ignored.append(name)
    return names, labels, ignored


def _compare_classes(root: str, split: str, train: list[str], other: list[str]) -> None:
    missing, extra = sorted(set(train) - set(other)), sorted(set(other) - set(train))
    if missing or extra:
        sides = f"only in train/ {missing or 'none'}, only in {split}/ {extra or 'none'}"
        raise ValueError(f"root: {root!r}: train/ and {split}/ have different classes: {sides}")
