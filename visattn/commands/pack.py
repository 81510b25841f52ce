"""`visattn pack FOLDER OUT`: many small files into a few tar shards, as webdataset reads them."""

import io
import os
import re
import tarfile
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from visattn.commands.inputs import complained, tracked
from visattn.data.images import FileImages, list_classes
from visattn.data.shards import CLASSES, write_index


def run(folder: str, out: str, /, *, shard_mib: int = 256, seed: int = 0) -> int:
    """Pack a folder or zip of class folders into tar shards, which train.py takes as --data.root.

    The files keep their bytes. Their order is shuffled, so that a reader that streams a shard meets
    all classes. Each sample is NUMBER-CLASS_NAME.jpg (or .png ...) and the class's number in
    NUMBER-CLASS_NAME.cls; the names of the classes lie in classes.txt, and where everything lies in
    index.npz, for a quick start.

    Args:
        folder: A folder or zip of class folders, or with train/, val/ and test/ of those.
        out: Folder to write the shards into; it must be new or empty.
        shard_mib: Size of a shard in MiB.
        seed: Of the order.
    """
    if shard_mib < 1:
        raise ValueError(f"--shard-mib must be 1 or more, got {shard_mib}")
    target = Path(out)
    if target.is_dir() and any(target.iterdir()):
        raise FileExistsError(
            f"{out} is not empty: give a new folder, or delete what an interrupted run left there"
        )
    splits = list_classes(folder)
    target.mkdir(parents=True, exist_ok=True)
    (target / CLASSES).write_text("\n".join(splits["train"].classes) + "\n", encoding="utf-8")
    paths, lost = [], []
    for split, images in splits.items():
        order = np.random.default_rng(seed).permutation(len(images)).tolist()
        watched = tracked(order, f"packing {split}", len(order))
        paths += write_shards(images, watched, target, split, size=shard_mib * 2**20, lost=lost)
    places = write_index(target, paths)
    print(
        f"{len(places.names):,} images of {len(splits['train'].classes)} classes lie in {len(paths)} shards in {out}"
    )
    print(
        f"train with them      uv run train.py fit --config configs/own_folder.yaml --data.root {out}"
    )
    return complained("visattn pack", lost)


def write_shards(
    images: FileImages, order: Iterable[int], out: Path, split: str, *, size: int, lost: list[str]
) -> list[Path]:
    """Write the images in this order into shards of about ``size`` bytes; files that cannot be read go to ``lost``."""
    paths, shard = [], None
    with ExitStack() as opened:
        for number, index in enumerate(order):
            try:
                data = images.data(index)
            except ValueError as error:
                lost.append(str(error))
                continue
            if shard is None or 0 < shard.offset > size - len(data):
                _finish(opened, paths)
                paths.append(out / f"{split}-{len(paths):06d}.tar")
                shard = opened.enter_context(
                    tarfile.open(_part(paths[-1]), "w", format=tarfile.USTAR_FORMAT)
                )
            stem, ending = os.path.splitext(images.name(index))
            key = f"{number:08d}-{re.sub('[^A-Za-z0-9_-]+', '_', stem)[-60:]}"
            _add(shard, key + ending.lower(), data)
            _add(shard, f"{key}.cls", str(images.labels[index]).encode())
        _finish(opened, paths)
    return paths


def _add(shard: tarfile.TarFile, name: str, data: bytes) -> None:
    entry = tarfile.TarInfo(name)
    entry.size = len(data)
    shard.addfile(entry, io.BytesIO(data))


def _finish(opened: ExitStack, paths: list[Path]) -> None:
    """Close the shard and give it its name; one that was interrupted keeps another."""
    opened.close()
    if paths:
        os.replace(_part(paths[-1]), paths[-1])


def _part(path: Path) -> Path:
    return path.with_name(f"{path.name}.part")
