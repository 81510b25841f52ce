"""The table of source types, and the splits of the source that the arguments select."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from visattn.data.csv_labels import CSV_LABELS
from visattn.data.hub_images import HUGGING_FACE
from visattn.data.images import CLASS_FOLDERS
from visattn.data.labels import check_labels, split_stratified
from visattn.data.remote import REMOTE_SHARDS
from visattn.data.shards import TAR_SHARDS
from visattn.data.source import ImageSource, SourceOptions, SourceType
from visattn.data.synthetic import SYNTHETIC
from visattn.data.torchvision_images import TORCHVISION
from visattn.names import suggest

# the first type that matches the arguments is used
SOURCE_TYPES: tuple[SourceType, ...] = (
    TORCHVISION,
    SYNTHETIC,
    HUGGING_FACE,
    CSV_LABELS,
    REMOTE_SHARDS,
    TAR_SHARDS,
    CLASS_FOLDERS,
)


class Split(NamedTuple):
    """The images of a split: some of a source, by index."""

    source: ImageSource
    indices: np.ndarray


def find_source_type(options: SourceOptions) -> SourceType:
    """The first type that matches; refuses a ``dataset`` that no type knows."""
    for source_type in SOURCE_TYPES:
        if source_type.matches(options):
            return source_type
    datasets = [name for source_type in SOURCE_TYPES for name in source_type.datasets]
    raise ValueError(
        f"dataset: there is no {options.dataset!r}; {suggest(str(options.dataset), datasets)}"
    )


def divide_splits(
    sources: Mapping[str, ImageSource], val_fraction: float, seed: int
) -> dict[str, Split]:
    """Every split with all its images; without a ``val``, a fraction of ``train`` becomes it."""
    splits = {}
    for name, source in sources.items():
        check_labels(name, source)
        splits[name] = Split(source, np.arange(len(source)))
    if "val" not in splits:
        source = sources["train"]
        train, val = split_stratified(source.labels, val_fraction, seed)
        splits["train"] = Split(source, train)
        splits["val"] = Split(source, val)
    return splits
