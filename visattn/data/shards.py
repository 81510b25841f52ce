"""Images in tar shards, as webdataset has them: `key.jpg` beside `key.cls`, thousands to a file.

A shard is not streamed: its samples are listed once and then read from where they lie. So an epoch
of shards is like one of files: exact in size, in the order that seed and epoch say, shared by any
number of processes, and resumed in its middle; shards may be uneven, or fewer than processes.
"""

import os
import re
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from visattn.data.decode import read_image
from visattn.data.images import SPLIT_OF, Names, is_image

INDEX, CLASSES = "index.npz", "classes.txt"


@dataclass(frozen=True)
class Places:
    """Where in the shards the samples lie, one entry each; and which ones are broken."""

    names: Names
    shard: np.ndarray
    offset: np.ndarray
    size: np.ndarray
    label: np.ndarray
    broken: tuple[str, ...] = ()

    def chosen(self, which: np.ndarray, broken: tuple[str, ...]) -> "Places":
        """Some of them."""
        columns = (self.shard[which], self.offset[which], self.size[which], self.label[which])
        return Places(Names(self.names[index] for index in which), *columns, broken)


class ShardImages:
    """Images inside tar files; every read opens its shard, so that processes share no handle."""

    def __init__(self, paths: list[Path], places: Places, classes: list[str]):
        self.paths, self.places, self.classes = paths, places, classes
        self.ignored, self.labels = list(places.broken), places.label

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, index: int) -> str:
        """Shard and key."""
        return self.places.names[index]

    def image(self, index: int, long_side: int | None = None) -> Image.Image:
        """The decoded image, RGB or L."""
        name = self.places.names[index]
        try:
            with open(self.paths[self.places.shard[index]], "rb") as shard:
                shard.seek(self.places.offset[index])
                data = shard.read(self.places.size[index])
        except OSError as error:
            raise ValueError(f"cannot read image {name!r}: {error}") from error
        return read_image(data, name, long_side)


def shards_in(root: str | os.PathLike) -> list[Path]:
    """The tar files that are or lie in ``root`` or in its train, val and test folders."""
    path = Path(root)
    if path.is_file():
        return [path] if path.suffix.lower() == ".tar" else []
    return sorted(
        shard
        for folder in (path, *(path / name for name in SPLIT_OF))
        for shard in folder.glob("*.tar")
    )


def list_shards(root: str | os.PathLike) -> dict[str, ShardImages]:
    """Splits of a tar or a folder of them; a word in a shard's path tells ``train``, ``val`` or ``test``."""
    paths = shards_in(root)
    folder = Path(root) if Path(root).is_dir() else Path(root).parent
    splits = np.array([_split_of(path.relative_to(folder)) for path in paths])
    if "train" not in splits:
        raise ValueError(
            f"root: {str(root)!r} has shards of {', '.join(sorted(set(splits)))} but none of train"
        )
    places, classes = read_index(folder, paths) or scan(folder, paths)
    return {
        str(split): _one_split(folder, paths, places, classes, splits == split)
        for split in np.unique(splits)
    }


def _one_split(
    folder: Path, paths: list[Path], places: Places, classes: list[str], mine: np.ndarray
) -> ShardImages:
    names = [
        str(path.relative_to(folder)) for path, wanted in zip(paths, mine, strict=True) if wanted
    ]
    broken = tuple(text for text in places.broken if text.startswith(tuple(names)))
    part = places.chosen(np.flatnonzero(mine[places.shard]), broken)
    if not len(part.names):
        raise ValueError(f"root: the shards {', '.join(names[:3])} hold no image with a label")
    return ShardImages(paths, part, classes)


def scan(folder: Path, paths: list[Path]) -> tuple[Places, list[str]]:
    """List the samples of the shards by reading every header, and number their classes."""
    rows, broken = [], []
    for number, path in enumerate(paths):
        for sample in _samples(path, str(path.relative_to(folder))):
            if isinstance(sample, str):
                broken.append(sample)
            else:
                rows.append((number, *sample))
    numbers, names, offsets, sizes, labels = zip(*rows, strict=True) if rows else ((),) * 5
    classes = _class_names(folder, set(labels))
    columns = (
        np.array(column, dtype=np.int64)
        for column in (numbers, offsets, sizes, _numbered(labels, classes))
    )
    shard, offset, size, label = columns
    return Places(Names(names), shard, offset, size, label, tuple(broken)), classes


def write_index(folder: Path, paths: list[Path]) -> Places:
    """Scan the shards once and keep what was found beside them, for a start without reading every header."""
    places, classes = scan(folder, paths)
    if not (folder / CLASSES).is_file():
        (folder / CLASSES).write_text("\n".join(classes) + "\n", encoding="utf-8")
    facts = {name: getattr(places, name) for name in ("shard", "offset", "size", "label")}
    facts |= {"names": np.frombuffer(places.names.block, np.uint8), "ends": places.names.ends}
    facts |= {"shards": np.array([str(path.relative_to(folder)) for path in paths])}
    facts |= {
        "marks": np.array([_mark(path) for path in paths]),
        "broken": np.array(places.broken, dtype=str),
    }
    with open(folder / f"{INDEX}.part", "wb") as part:
        np.savez(part, **facts)
    os.replace(part.name, folder / INDEX)
    return places


def read_index(folder: Path, paths: list[Path]) -> tuple[Places, list[str]] | None:
    """What ``write_index`` kept, or None where there is nothing or it is of other shards than these."""
    if not (folder / INDEX).is_file() or not (folder / CLASSES).is_file():
        return None
    with np.load(folder / INDEX, allow_pickle=False) as kept:
        facts = dict(kept)
    known = dict(zip(facts["shards"].tolist(), facts["marks"].tolist(), strict=True))
    here = {str(path.relative_to(folder)): _mark(path) for path in paths}
    lost = sorted(known.keys() - here.keys())
    if lost:
        raise FileNotFoundError(
            f"root: {str(folder)!r} lacks {len(lost)} of its shards, the first is {lost[0]!r}"
        )
    if known != here:
        return None
    names = Names.of_block(facts["names"].tobytes(), facts["ends"])
    columns = (facts[name] for name in ("shard", "offset", "size", "label"))
    return Places(names, *columns, tuple(facts["broken"].tolist())), _written_classes(folder)


def _mark(path: Path) -> str:
    """What tells a shard from another of its name: size and check sum of its beginning."""
    with open(path, "rb") as shard:
        return f"{path.stat().st_size}-{zlib.crc32(shard.read(4096))}"


def _samples(path: Path, name: str) -> Iterator[tuple[str, int, int, str] | str]:
    """(name, offset, size, label) of each sample of a shard; a sentence for each that is broken."""
    end, key, found = path.stat().st_size, None, {}
    try:
        with tarfile.open(path, "r:") as shard:
            for member in shard:
                if not member.isfile():
                    continue
                folder, _, base = member.name.rpartition("/")
                stem, _, ending = base.partition(".")
                if (folder, stem) != key:
                    yield from _sample(name, key, found)
                    key, found = (folder, stem), {}
                if member.offset_data + member.size > end:
                    raise tarfile.ReadError("unexpected end of data")
                if is_image(member.name):
                    found["image"] = member.offset_data, member.size
                elif ending.lower() == "cls":
                    found["label"] = (
                        shard.extractfile(member).read(1000).decode("utf-8", "replace").strip()
                    )
            yield from _sample(name, key, found)
    except tarfile.TarError as error:
        if key is None:
            raise ValueError(f"root: {str(path)!r} is not a readable tar file ({error})") from error
        yield f"{name}: ends in the middle ({error})"


def _sample(
    shard: str, key: tuple[str, str] | None, found: dict
) -> Iterator[tuple[str, int, int, str] | str]:
    if key is None:
        return
    name = f"{shard}/{'/'.join(filter(None, key))}"
    missing = [part for part in ("image", "label") if not found.get(part)]
    yield (
        f"{name}: has no {' and no '.join(missing)}"
        if missing
        else (name, *found["image"], found["label"])
    )


def _split_of(path: Path) -> str:
    """The split whose name is a word of the path, else train."""
    words = re.split(r"[^a-z]+", path.as_posix().lower())
    return next((SPLIT_OF[word] for word in words if word in SPLIT_OF), "train")


def _written_classes(folder: Path) -> list[str]:
    return (folder / CLASSES).read_text(encoding="utf-8").splitlines()


def _class_names(folder: Path, labels: set[str]) -> list[str]:
    """Those of classes.txt; without it the labels themselves, or the numbers up to the largest."""
    if (folder / CLASSES).is_file():
        return _written_classes(folder)
    if all(_is_number(label) for label in labels):
        return [str(number) for number in range(1 + max(map(int, labels), default=-1))]
    return sorted(labels)


def _numbered(labels: tuple[str, ...], classes: list[str]) -> list[int]:
    """Class numbers; a name that is no class is refused, a number out of range where all labels are checked."""
    number = {name: index for index, name in enumerate(classes)}
    numbers = [int(label) if _is_number(label) else number.get(label, -1) for label in labels]
    if -1 in numbers:
        unknown = labels[numbers.index(-1)]
        raise ValueError(
            f"root: a shard has the label {unknown!r}, which is not in {CLASSES}: {', '.join(classes)}"
        )
    return numbers


def _is_number(label: str) -> bool:
    return label.removeprefix("-").isdecimal()
