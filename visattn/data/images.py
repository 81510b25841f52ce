"""Images of a folder or zip: labeled, undecoded files, with classes named by folders."""

import os
import zipfile
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from visattn.data.decode import read_image
from visattn.data.source import SPLIT_OF, SourceOptions, SourceType
from visattn.data.stores import Archive, Folder, open_store

EXTENSIONS = frozenset(
    ".avif .bmp .gif .jfif .jp2 .jpeg .jpg .pbm .pgm .png .ppm .tif .tiff .webp".split()
)
# what a store raises for a file that is lost, cut, garbled or encrypted
UNREADABLE = (OSError, EOFError, zipfile.BadZipFile, zlib.error, RuntimeError, NotImplementedError)


class PackedNames:
    """Many file names as one block of bytes.

    A million names need the memory of their letters only, and workers share it.
    """

    def __init__(self, names: Iterable[str]):
        encoded = [name.encode("utf-8", "surrogateescape") for name in names]
        self.block = b"".join(encoded)
        self.ends = np.cumsum([0, *map(len, encoded)])

    @classmethod
    def from_block(cls, block: bytes, ends: np.ndarray) -> "PackedNames":
        """The names that another's ``block`` and ``ends`` hold."""
        names = cls(())
        names.block = block
        names.ends = ends
        return names

    def __len__(self) -> int:
        return len(self.ends) - 1

    def __getitem__(self, index: int) -> str:
        start = self.ends[index]
        stop = self.ends[index + 1]
        encoded = self.block[start:stop]
        return encoded.decode("utf-8", "surrogateescape")


class FileImages:
    """Image files of a folder or zip.

    Args:
        store: the folder or zip.
        names: path of every image within it.
        labels: (N,) class numbers, or (N, C) of 0 and 1 where an image may have several classes.
        classes: names of the classes.
        ignored: files that are not used.
    """

    def __init__(
        self,
        store: Folder | Archive,
        names: Iterable[str],
        labels: Sequence[int] | np.ndarray,
        classes: list[str],
        ignored: Iterable[str] = (),
    ):
        self.store = store
        self.names = PackedNames(names)
        self.labels = np.asarray(labels)
        self.classes = classes
        self.ignored = list(ignored)

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
        folder = Folder(path.parent)
        return FileImages(folder, [path.name], [0], [])
    store = open_store(path, argument)
    files, _ = store.entries()
    images = [name for name in files if is_image(name)]
    ignored = [name for name in files if not is_image(name)]
    if not images:
        raise ValueError(f"{argument}: {str(root)!r} holds no image ({len(files)} other files)")
    labels = np.zeros(len(images), dtype=np.int64)
    return FileImages(store, images, labels, [], ignored)


def list_classes(root: str | os.PathLike) -> dict[str, FileImages]:
    """Splits of a folder or zip of class folders: ``train``; ``val`` and ``test`` if present."""
    store = open_store(root)
    files, folders = store.entries()
    top = _find_top(folders)
    relative = set(_below(top, folders))
    if not any(name.startswith("train/") for name in relative):
        outer = {name for name in relative if "/" not in name}
        if outer and outer <= SPLIT_OF.keys():
            raise ValueError(
                f"root: {str(root)!r} has {sorted(outer)} but no train/ with class folders in it"
            )
        return {"train": _list_split(store, top, files, folders)}
    splits = {}
    for folder, split in SPLIT_OF.items():
        if folder in relative:
            splits[split] = _list_split(store, f"{top}{folder}/", files, folders)
    for split, images in splits.items():
        _compare_classes(str(root), split, splits["train"].classes, images.classes)
    return splits


def is_image(name: str) -> bool:
    """Whether the name ends as those of images do."""
    _, extension = os.path.splitext(name)
    return extension.lower() in EXTENSIONS


def _below(prefix: str, folders: list[str]) -> list[str]:
    """The folders below ``prefix``, relative to it."""
    return [name.removeprefix(prefix) for name in folders if name.startswith(prefix)]


def _find_top(folders: list[str]) -> str:
    """The prefix of a lone outer folder, which many zips have; empty where there is none."""
    top = ""
    while True:
        children = [name for name in _below(top, folders) if "/" not in name]
        # several folders are classes or splits; a lone train/ is a split
        if len(children) != 1 or children[0] in SPLIT_OF:
            return top
        deeper = f"{top}{children[0]}/"
        # a lone folder without folders in it is a class
        if not any(name.startswith(deeper) for name in folders):
            return top
        top = deeper


def _list_split(
    store: Folder | Archive,
    prefix: str,
    files: list[str],
    folders: list[str],
) -> FileImages:
    """The images of the class folders directly below ``prefix``."""
    location = repr(str(store.path))
    if prefix:
        location += f", {prefix}"
    classes = [name for name in _below(prefix, folders) if "/" not in name]
    names, labels, ignored = _label_by_folder(files, prefix, classes)
    if len(classes) < 2:
        outside = f" and {len(ignored)} files outside" if ignored else ""
        raise ValueError(
            f"root: {location} must hold at least two class folders with images, or train/ and "
            f"val/ with class folders in them; got {classes or 'none'}{outside}{_zip_hint(files)}"
        )
    counts = np.bincount(labels, minlength=len(classes))
    empty = [classes[number] for number in np.flatnonzero(counts == 0)]
    if empty:
        raise ValueError(f"root: {location} has class folders without an image: {', '.join(empty)}")
    class_numbers = np.asarray(labels, dtype=np.int64)
    return FileImages(store, names, class_numbers, classes, ignored)


def _zip_hint(files: list[str]) -> str:
    zips = [name for name in files if name.lower().endswith(".zip")]
    if not zips:
        return ""
    return f"; unzip {', '.join(zips[:3])} there, or name one of them as root"


def _label_by_folder(
    files: list[str], prefix: str, classes: list[str]
) -> tuple[list[str], list[int], list[str]]:
    """Names and class numbers of the images below ``prefix``, and the files that are not used."""
    class_numbers = {name: number for number, name in enumerate(classes)}
    names = []
    labels = []
    ignored = []
    for name in files:
        if not name.startswith(prefix):
            continue
        folder, _, _ = name.removeprefix(prefix).partition("/")
        label = class_numbers.get(folder)
        if label is not None and is_image(name):
            names.append(name)
            labels.append(label)
        elif label is not None or is_image(name):
            # other files beside the classes, such as a licence, are no mistake
            ignored.append(name)
    return names, labels, ignored


def _compare_classes(
    root: str, split: str, train_classes: list[str], split_classes: list[str]
) -> None:
    missing = sorted(set(train_classes) - set(split_classes))
    extra = sorted(set(split_classes) - set(train_classes))
    if missing or extra:
        raise ValueError(
            f"root: {root!r}: train/ and {split}/ have different classes: "
            f"only in train/ {missing or 'none'}, only in {split}/ {extra or 'none'}"
        )


def _matches(options: SourceOptions) -> bool:
    return options.dataset is None and options.root is not None


def _list_splits(options: SourceOptions) -> dict[str, FileImages]:
    return list_classes(options.require_root())


CLASS_FOLDERS = SourceType("folder or zip of class folders", _matches, _list_splits)
