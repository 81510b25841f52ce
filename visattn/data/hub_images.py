"""Data sets of Hugging Face, as ``hf:NAME``: a name of the hub or a folder of ``save_to_disk``."""

from functools import partial
from pathlib import Path
from typing import Any

from visattn.data.library_images import LibraryImages
from visattn.data.source import SPLIT_OF, SourceOptions, SourceType

PREFIX = "hf:"


def hub_images(name: str, download: bool = False) -> dict[str, LibraryImages]:
    """The splits of a data set: a folder that ``save_to_disk`` wrote, or a name of the hub."""
    try:
        import datasets
    except ImportError as error:
        raise ImportError(
            f"dataset: hf:{name} needs the package datasets: pip install 'visattn[hf]'"
        ) from error

    if Path(name).is_dir():
        dataset = datasets.load_from_disk(name)
    else:
        dataset = _load_dataset(datasets, name, download)
    # a data set without splits is all training
    tables = dict(dataset) if isinstance(dataset, dict) else {"train": dataset}
    splits = {}
    for split_name, table in tables.items():
        if split_name in SPLIT_OF:
            splits[SPLIT_OF[split_name]] = _read_split(datasets, name, table)
    if "train" not in splits:
        raise ValueError(f"dataset: hf:{name} has no split named train; it has {', '.join(tables)}")
    return splits


def _load_dataset(datasets: Any, name: str, download: bool) -> Any:
    config = datasets.DownloadConfig(local_files_only=not download)
    try:
        return datasets.load_dataset(name, download_config=config)
    except Exception as error:  # its dozen types for what is missing share no base
        hint = "" if download else "; set download: true to fetch it from the network"
        reason = type(error).__name__
        if str(error):
            reason = str(error).splitlines()[0]
        raise FileNotFoundError(f"dataset: cannot open hf:{name} ({reason}){hint}") from error


def _read_split(datasets: Any, name: str, table: Any) -> LibraryImages:
    """The images and labels of one table, by the types of its columns."""
    image_columns = _columns_of(table, datasets.Image)
    label_columns = _columns_of(table, datasets.ClassLabel)
    if len(image_columns) != 1 or len(label_columns) != 1:
        raise ValueError(
            f"dataset: hf:{name} must have one column of images and one of class labels; "
            f"got {image_columns or 'none'} and {label_columns or 'none'} "
            f"among {', '.join(table.features)}"
        )
    image_column = image_columns[0]
    label_column = label_columns[0]
    classes = list(table.features[label_column].names)
    # files are decoded here, as those of folders
    undecoded = table.cast_column(image_column, datasets.Image(decode=False))
    read = partial(_read_file, undecoded, image_column)
    return LibraryImages(read, table[label_column][:], classes)


def _columns_of(table: Any, feature_class: type) -> list[str]:
    return [name for name, feature in table.features.items() if isinstance(feature, feature_class)]


def _read_file(table: Any, column: str, index: int) -> bytes:
    """The bytes of one image, which the table holds itself or as a path."""
    cell = table[index][column] or {}
    content = cell.get("bytes")
    if content is not None:
        return content
    path = cell.get("path")
    if path is None:
        raise ValueError("its row holds no image")
    return Path(path).read_bytes()


def _matches(options: SourceOptions) -> bool:
    return options.dataset is not None and options.dataset.startswith(PREFIX)


def _list_splits(options: SourceOptions) -> dict[str, LibraryImages]:
    name = str(options.dataset).removeprefix(PREFIX)
    return hub_images(name, options.download)


HUGGING_FACE = SourceType(
    "Hugging Face",
    _matches,
    _list_splits,
    datasets=(f"{PREFIX}NAME",),
    download=_list_splits,
)
