"""Which of the readers a root or the name of a data set means."""

import os
from difflib import get_close_matches

import numpy as np

from visattn.data.images import FileImages, list_classes
from visattn.data.labels import check_labels, list_table, split_stratified
from visattn.data.libraries import TORCHVISION, LibraryImages, hub_images, torchvision_images
from visattn.data.remote import fetched, is_remote
from visattn.data.shards import ShardImages, list_shards, shards_in
from visattn.data.synthetic import PlacedCharacters

DATASETS = (*TORCHVISION, "synthetic")
HUB = "hf:"

Source = FileImages | ShardImages | LibraryImages | PlacedCharacters


def check_dataset(name: str | None) -> None:
    """Refuse a name that is no data set's, with the nearest that is."""
    if name is None or name in DATASETS or name.startswith(HUB):
        return
    near = get_close_matches(name, DATASETS, n=1)
    hint = (
        f"did you mean {near[0]!r}?" if near else f"known are {', '.join(DATASETS)} and {HUB}NAME"
    )
    raise ValueError(f"dataset: there is no {name!r}; {hint}")


def home(root: str | None, dataset: str) -> str:
    """Where torchvision's files lie."""
    return root or os.path.join("data", dataset)


def find_splits(
    root: str | None,
    dataset: str | None,
    *,
    labels: str | None,
    download: bool,
    image_size: tuple[int, int],
    seed: int,
) -> dict[str, Source]:
    """The splits of the images that are meant, ``train`` among them, by name."""
    if dataset == "synthetic":
        options = {"image_size": image_size, "seed": seed, "archive": root}
        return {split: PlacedCharacters(split, **options) for split in ("train", "val", "test")}
    if dataset is not None and dataset.startswith(HUB):
        return hub_images(dataset.removeprefix(HUB), download)
    if dataset is not None:
        return torchvision_images(dataset, home(root, dataset))
    if labels is not None:
        return list_table(root, labels)
    if is_remote(root):
        return list_shards(fetched(root, download))
    return list_shards(root) if shards_in(root) else list_classes(root)


def parts_of(
    found: dict[str, Source], fraction: float, seed: int
) -> dict[str, tuple[Source, np.ndarray]]:
    """Each split with the indices of its images; where there is no ``val``, a fraction of ``train`` becomes it."""
    for split, source in found.items():
        check_labels(split, source)
    parts = {split: (source, np.arange(len(source))) for split, source in found.items()}
    if "val" not in parts:
        rest, held = split_stratified(found["train"].labels, fraction, seed)
        parts |= {"train": (found["train"], rest), "val": (found["train"], held)}
    return parts
