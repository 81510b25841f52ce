"""Where the samples are in tar shards: by reading every header, or from an index file."""

import os
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from visattn.data.images import PackedNames, is_image

INDEX = "index.npz"
CLASSES = "classes.txt"
_ARRAYS = ("shard", "offset", "size", "label")
_LONGEST_LABEL = 1000  # bytes
_FINGERPRINT_BYTES = 4096


@dataclass(frozen=True)
class TarIndex:
    """Where the image of each sample is in the shards; one entry per sample.

    Args:
        names: shard and key.
        shard: number of the shard.
        offset: of the image in the shard, in bytes.
        size: of the image, in bytes.
        label: class number.
        broken: a sentence for each sample that cannot be used.
    """

    names: PackedNames
    shard: np.ndarray
    offset: np.ndarray
    size: np.ndarray
    label: np.ndarray
    broken: tuple[str, ...] = ()

    def select(self, samples: np.ndarray, broken: tuple[str, ...]) -> "TarIndex":
        """The index of some of the samples."""
        return TarIndex(
            names=PackedNames(self.names[sample] for sample in samples),
            shard=self.shard[samples],
            offset=self.offset[samples],
            size=self.size[samples],
            label=self.label[samples],
            broken=broken,
        )


class _Sample(NamedTuple):
    """A complete sample of a shard."""

    name: str
    offset: int
    size: int
    label: str


@dataclass
class _OpenSample:
    """A sample whose members are being read: all those of the same key in a row."""

    folder: str
    stem: str
    offset: int = 0
    size: int = 0
    label: str = ""

    def close(self, shard: str) -> _Sample | str:
        """The sample, or a sentence about what it lacks."""
        name = "/".join(filter(None, (shard, self.folder, self.stem)))
        missing = []
        if not self.offset:  # a header precedes every member: no image is at 0
            missing.append("image")
        if not self.label:
            missing.append("label")
        if missing:
            return f"{name}: has no {' and no '.join(missing)}"
        return _Sample(name, self.offset, self.size, self.label)


def scan_shards(folder: Path, paths: list[Path]) -> tuple[TarIndex, list[str]]:
    """List the samples of the shards by reading every header, and number their classes."""
    shards = []
    samples = []
    broken = []
    for number, path in enumerate(paths):
        shard_name = str(path.relative_to(folder))
        for sample in _read_samples(path, shard_name):
            if isinstance(sample, str):
                broken.append(sample)
            else:
                shards.append(number)
                samples.append(sample)
    labels = [sample.label for sample in samples]
    classes = _list_class_names(folder, set(labels))
    offsets = [sample.offset for sample in samples]
    sizes = [sample.size for sample in samples]
    numbers = _number_labels(labels, classes)
    index = TarIndex(
        names=PackedNames(sample.name for sample in samples),
        shard=np.array(shards, dtype=np.int64),
        offset=np.array(offsets, dtype=np.int64),
        size=np.array(sizes, dtype=np.int64),
        label=np.array(numbers, dtype=np.int64),
        broken=tuple(broken),
    )
    return index, classes


def write_index(folder: Path, paths: list[Path]) -> TarIndex:
    """Scan the shards and write the index beside them, so that later starts read no headers."""
    index, classes = scan_shards(folder, paths)
    if not (folder / CLASSES).is_file():
        (folder / CLASSES).write_text("\n".join(classes) + "\n", encoding="utf-8")
    arrays = {name: getattr(index, name) for name in _ARRAYS}
    arrays["names"] = np.frombuffer(index.names.block, np.uint8)
    arrays["ends"] = index.names.ends
    fingerprints = _fingerprint_shards(folder, paths)
    shard_names, marks = zip(*fingerprints.items(), strict=True)
    arrays["shards"] = np.array(shard_names)
    arrays["marks"] = np.array(marks)
    arrays["broken"] = np.array(index.broken, dtype=str)
    # renamed once complete, so that no reader finds half an index
    with open(folder / f"{INDEX}.part", "wb") as part:
        np.savez(part, **arrays)
    os.replace(part.name, folder / INDEX)
    return index


def read_index(folder: Path, paths: list[Path]) -> tuple[TarIndex, list[str]] | None:
    """The index that ``write_index`` wrote; None if there is none or it is of other shards."""
    if not (folder / INDEX).is_file() or not (folder / CLASSES).is_file():
        return None
    with np.load(folder / INDEX, allow_pickle=False) as file:
        arrays = dict(file)
    names = arrays["shards"].tolist()
    fingerprints = arrays["marks"].tolist()
    indexed = dict(zip(names, fingerprints, strict=True))
    present = _fingerprint_shards(folder, paths)
    missing = sorted(indexed.keys() - present.keys())
    if missing:
        raise FileNotFoundError(
            f"root: {str(folder)!r} lacks {len(missing)} of its shards, the first is {missing[0]!r}"
        )
    if indexed != present:  # shards were added or written anew
        return None
    index = TarIndex(
        names=PackedNames.from_block(arrays["names"].tobytes(), arrays["ends"]),
        shard=arrays["shard"],
        offset=arrays["offset"],
        size=arrays["size"],
        label=arrays["label"],
        broken=tuple(arrays["broken"].tolist()),
    )
    return index, _read_class_names(folder)


def _fingerprint_shards(folder: Path, paths: list[Path]) -> dict[str, str]:
    """By name, what distinguishes a shard from another: size and checksum of its beginning."""
    fingerprints = {}
    for path in paths:
        with open(path, "rb") as shard:
            checksum = zlib.crc32(shard.read(_FINGERPRINT_BYTES))
        name = str(path.relative_to(folder))
        fingerprints[name] = f"{path.stat().st_size}-{checksum}"
    return fingerprints


def _read_samples(path: Path, shard_name: str) -> Iterator[_Sample | str]:
    """Each sample of a shard; a sentence in place of each that is broken."""
    shard_size = path.stat().st_size
    sample = None
    try:
        with tarfile.open(path, "r:") as shard:
            for member in shard:
                if not member.isfile():
                    continue
                folder, _, base = member.name.rpartition("/")
                stem, _, ending = base.partition(".")
                if sample is None or (sample.folder, sample.stem) != (folder, stem):
                    if sample is not None:
                        yield sample.close(shard_name)
                    sample = _OpenSample(folder, stem)
                if member.offset_data + member.size > shard_size:
                    raise tarfile.ReadError("unexpected end of data")
                if is_image(member.name):
                    sample.offset = member.offset_data
                    sample.size = member.size
                elif ending.lower() == "cls":
                    sample.label = _read_label(shard, member)
            if sample is not None:
                yield sample.close(shard_name)
    except tarfile.TarError as error:
        if sample is None:
            raise ValueError(f"root: {str(path)!r} is not a readable tar file ({error})") from error
        yield f"{shard_name}: ends in the middle ({error})"


def _read_label(shard: tarfile.TarFile, member: tarfile.TarInfo) -> str:
    file = shard.extractfile(member)
    assert file is not None, "the member is a file"
    text = file.read(_LONGEST_LABEL).decode("utf-8", "replace")
    return text.strip()


def _read_class_names(folder: Path) -> list[str]:
    return (folder / CLASSES).read_text(encoding="utf-8").splitlines()


def _list_class_names(folder: Path, labels: set[str]) -> list[str]:
    """Those of classes.txt; without it the labels themselves, or the numbers up to the largest."""
    if (folder / CLASSES).is_file():
        return _read_class_names(folder)
    if all(_is_number(label) for label in labels):
        largest = max(map(int, labels), default=-1)
        return [str(number) for number in range(1 + largest)]
    return sorted(labels)


def _number_labels(labels: list[str], classes: list[str]) -> list[int]:
    """Class numbers of the labels, which are numbers or names; an unknown name is refused.

    A number out of range is refused later, where the labels of all sources are checked.
    """
    class_numbers = {name: number for number, name in enumerate(classes)}
    numbers = []
    for label in labels:
        number = int(label) if _is_number(label) else class_numbers.get(label, -1)
        if number == -1:
            raise ValueError(
                f"root: a shard has the label {label!r}, which is not in {CLASSES}: "
                f"{', '.join(classes)}"
            )
        numbers.append(number)
    return numbers


def _is_number(label: str) -> bool:
    return label.removeprefix("-").isdecimal()
