"""`visattn pack FOLDER OUT`: many small files into a few tar shards, as webdataset reads them."""

import io
import os
import re
import tarfile
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from visattn.commands.inputs import report_left_out, show_progress
from visattn.data.images import FileImages, list_classes
from visattn.data.tar_index import CLASSES, write_index

LONGEST_STEM = 60  # characters of a file's name that its sample keeps


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
    classes = splits["train"].classes
    target.mkdir(parents=True, exist_ok=True)
    (target / CLASSES).write_text("\n".join(classes) + "\n", encoding="utf-8")
    paths: list[Path] = []
    unreadable: list[str] = []
    for split, images in splits.items():
        order = np.random.default_rng(seed).permutation(len(images)).tolist()
        steps = show_progress(order, f"packing {split}", len(order))
        size = shard_mib * 2**20
        paths += write_shards(images, steps, target, split, size=size, lost=unreadable)
    index = write_index(target, paths)
    command = f"uv run train.py fit --config configs/own_folder.yaml --data.root {out}"
    print(
        f"{len(index.names):,} images of {len(classes)} classes lie in {len(paths)} shards in {out}"
    )
    print(f"train with them      {command}")
    return report_left_out("visattn pack", unreadable)


def write_shards(
    images: FileImages,
    order: Iterable[int],
    out: Path,
    split: str,
    *,
    size: int,
    lost: list[str],
) -> list[Path]:
    """Write images in this order into shards of about ``size`` bytes.

    The reason why a file cannot be read goes to ``lost``.
    """
    paths: list[Path] = []
    shard = None
    with ExitStack() as stack:
        for number, index in enumerate(order):
            try:
                content = images.data(index)
            except ValueError as error:
                lost.append(str(error))
                continue
            if shard is None or 0 < shard.offset > size - len(content):
                finish_shard(stack, paths)
                paths.append(out / f"{split}-{len(paths):06d}.tar")
                # USTAR: plain headers, which any reader of tar files takes.
                tar = tarfile.open(partial_path(paths[-1]), "w", format=tarfile.USTAR_FORMAT)
                shard = stack.enter_context(tar)
            stem, ending = os.path.splitext(images.name(index))
            key = f"{number:08d}-{safe_stem(stem)}"
            add_member(shard, key + ending.lower(), content)
            add_member(shard, f"{key}.cls", str(images.labels[index]).encode())
        finish_shard(stack, paths)
    return paths


def safe_stem(stem: str) -> str:
    """Return the end of a file's name in letters that every reader of tar files takes."""
    return re.sub("[^A-Za-z0-9_-]+", "_", stem)[-LONGEST_STEM:]


def add_member(shard: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    shard.addfile(member, io.BytesIO(content))


def finish_shard(stack: ExitStack, paths: list[Path]) -> None:
    """Close the shard and give it its final name; an interrupted one keeps the partial name."""
    stack.close()
    if paths:
        os.replace(partial_path(paths[-1]), paths[-1])


def partial_path(path: Path) -> Path:
    return path.with_name(f"{path.name}.part")
