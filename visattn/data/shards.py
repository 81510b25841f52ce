"""Images in tar shards, as webdataset writes them: `key.jpg` beside `key.cls`, thousands per file.

A shard is not streamed: its samples are listed once and then read at their offsets. So an epoch of
shards is like one of files: exact in size, in the order of seed and epoch, shared by any number of
processes, and resumable in its middle; shards may differ in size, or be fewer than processes.
"""

import os
import re
from pathlib import Path

import numpy as np
from PIL import Image

from visattn.data.decode import read_image
from visattn.data.source import SPLIT_OF, SourceOptions, SourceType
from visattn.data.tar_index import TarIndex, read_index, scan_shards


class ShardImages:
    """Images inside tar files; every read opens its shard, so that processes share no handle."""

    def __init__(self, paths: list[Path], index: TarIndex, classes: list[str]):
        self.paths = paths
        self.index = index
        self.classes = classes
        self.labels = index.label
        self.ignored = list(index.broken)

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, index: int) -> str:
        """Shard and key."""
        return self.index.names[index]

    def image(self, index: int, long_side: int | None = None) -> Image.Image:
        """The decoded image, RGB or L."""
        name = self.name(index)
        path = self.paths[self.index.shard[index]]
        try:
            with open(path, "rb") as shard:
                shard.seek(self.index.offset[index])
                content = shard.read(self.index.size[index])
        except OSError as error:
            raise ValueError(f"cannot read image {name!r}: {error}") from error
        return read_image(content, name, long_side)


def find_shards(root: str | os.PathLike) -> list[Path]:
    """The tar file at ``root``, or those in it and in its train, val and test folders."""
    path = Path(root)
    if path.is_file():
        return [path] if path.suffix.lower() == ".tar" else []
    shards = list(path.glob("*.tar"))
    for name in SPLIT_OF:
        shards += (path / name).glob("*.tar")
    return sorted(shards)


def list_shards(root: str | os.PathLike) -> dict[str, ShardImages]:
    """Splits of a tar or a folder of them, told by a word in a shard's path: train, val or test."""
    paths = find_shards(root)
    folder = Path(root) if Path(root).is_dir() else Path(root).parent
    shard_splits = np.array([_split_of(path.relative_to(folder)) for path in paths])
    if "train" not in shard_splits:
        splits = ", ".join(sorted(set(shard_splits)))
        raise ValueError(f"root: {str(root)!r} has shards of {splits} but none of train")
    # without an index, or with one of other shards, every header is read
    index, classes = read_index(folder, paths) or scan_shards(folder, paths)
    sources = {}
    for split in np.unique(shard_splits):
        split_index = _select_split(folder, paths, index, shard_splits == split)
        sources[str(split)] = ShardImages(paths, split_index, classes)
    return sources


def _select_split(
    folder: Path, paths: list[Path], index: TarIndex, in_split: np.ndarray
) -> TarIndex:
    """The samples of the shards for which ``in_split`` is true."""
    split_numbers = np.flatnonzero(in_split)
    split_paths = [paths[number] for number in split_numbers]
    names = [str(path.relative_to(folder)) for path in split_paths]
    # each sentence on a broken sample begins with the name of its shard
    broken = [text for text in index.broken if text.startswith(tuple(names))]
    samples = np.flatnonzero(in_split[index.shard])
    if not len(samples):
        raise ValueError(f"root: the shards {', '.join(names[:3])} hold no image with a label")
    return index.select(samples, tuple(broken))


def _split_of(path: Path) -> str:
    """The split whose name is a word of the path, else train."""
    words = re.split(r"[^a-z]+", path.as_posix().lower())
    for word in words:
        if word in SPLIT_OF:
            return SPLIT_OF[word]
    return "train"


def _matches(options: SourceOptions) -> bool:
    if options.dataset is not None or options.root is None:
        return False
    return bool(find_shards(options.root))


def _list_splits(options: SourceOptions) -> dict[str, ShardImages]:
    return list_shards(options.require_root())


TAR_SHARDS = SourceType("tar shards", _matches, _list_splits)
