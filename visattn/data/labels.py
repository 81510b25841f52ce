"""Labels: read from a table beside the images, checked, counted, and split into training and validation."""

import csv
import io
import os
from difflib import get_close_matches
from pathlib import Path

import numpy as np

from visattn.data.images import SPLIT_OF, FileImages, is_image
from visattn.data.stores import Archive, Folder, open_store

SEPARATOR = ";"


def list_table(root: str | os.PathLike, table: str | os.PathLike) -> dict[str, FileImages]:
    """Images of a folder or zip, labeled by a CSV file.

    Its columns are ``file``, the path within the root; ``label``, one class, or ``labels``, any
    number of classes with semicolons between; and if wanted ``split``: train, val or test.
    """
    store = open_store(root)
    listed = store.entries()[0]
    path, content = _table(store, listed, table)
    rows, several = _rows(path, content)
    files = {name for name in listed if is_image(name)}
    _check_rows(path, rows, files)
    classes = _in_order({name for _, names, _ in rows for name in names})
    if len(classes) < 2:
        raise ValueError(
            f"labels: {str(path)!r} must name at least two classes, got {classes or 'none'}"
        )
    unnamed = sorted(files - {name for name, _, _ in rows})
    parts = {}
    for split in dict.fromkeys(split for _, _, split in rows):
        part = [row for row in rows if row[2] == split]
        parts[split] = _part(store, part, classes, several, unnamed if split == "train" else ())
    if "train" not in parts:
        raise ValueError(f"labels: {str(path)!r} has no row whose split is train")
    return parts


def check_labels(split: str, source) -> None:
    """Refuse class numbers that have no class, naming the first image that has one."""
    if source.labels.ndim > 1:
        return
    wrong = np.flatnonzero((source.labels < 0) | (source.labels >= len(source.classes)))
    if len(wrong):
        first = int(wrong[0])
        raise ValueError(
            f"{split}: {len(wrong)} images have a label out of range, the first is image {first} with "
            f"{source.labels[first]}; there are {len(source.classes)} classes, 0 to {len(source.classes) - 1}"
        )


def check_same_classes(there: list[str], here: list[str]) -> None:
    """Refuse data whose classes are not those of a checkpoint, naming what differs."""
    if there == here:
        return
    lost, new = sorted(set(there) - set(here)), sorted(set(here) - set(there))
    sides = (
        f"only there {lost or 'none'}, only here {new or 'none'}"
        if lost or new
        else "here they have another order"
    )
    raise ValueError(f"the checkpoint was trained on other classes: {sides}")


def class_counts(labels: np.ndarray, num_classes: int) -> list[int]:
    """Images of each class."""
    return (
        labels.sum(0) if labels.ndim > 1 else np.bincount(labels, minlength=num_classes)
    ).tolist()


def class_weights(counts: list[int]) -> list[float]:
    """Weights in inverse proportion to the counts, 1 on the mean over all images; 0 for a class without an image.

    Example:
        >>> class_weights([10, 30])
        [2.0, 0.6666666666666666]
    """
    present = sum(count > 0 for count in counts)
    return [sum(counts) / (present * count) if count else 0.0 for count in counts]


def split_stratified(
    labels: np.ndarray, fraction: float, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Indices of two parts; the second holds ``fraction`` of each class, at least one image of it if it has two.

    Where an image may have several classes, ``fraction`` of the images is drawn without regard to
    them.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"val_fraction must lie between 0 and 1, got {fraction}")
    groups = (
        [np.arange(len(labels))]
        if labels.ndim > 1
        else [np.flatnonzero(labels == n) for n in np.unique(labels)]
    )
    numbers = [0] if labels.ndim > 1 else np.unique(labels)
    rest, held = [], []
    for number, group in zip(numbers, groups, strict=True):
        members = np.random.default_rng([seed, number]).permutation(group)
        count = min(max(1, round(len(members) * fraction)), len(members) - 1)
        held.append(members[:count])
        rest.append(members[count:])
    if not sum(map(len, held)):
        raise ValueError(
            "root: a class needs two images or more, one of them for validation; all classes have one"
        )
    return np.sort(np.concatenate(rest)), np.sort(np.concatenate(held))


def _table(
    store: Folder | Archive, listed: list[str], table: str | os.PathLike
) -> tuple[Path, bytes]:
    """The table as given, or beside the images, also where those lie in a zip: its path and content."""
    path, inside = Path(table), store.path / table
    if path.is_file():
        return path, path.read_bytes()
    if inside.is_file():
        return inside, inside.read_bytes()
    if Path(table).as_posix() in listed:
        return inside, store.read(Path(table).as_posix())
    raise FileNotFoundError(
        f"labels: there is no file {str(table)!r}, neither here nor in root {str(store.path)!r}"
    )


def _rows(path: Path, content: bytes) -> tuple[list[tuple[str, list[str], str]], bool]:
    """(file, classes, split) of every row, and whether a row may name several classes."""
    try:
        reader = csv.DictReader(
            io.StringIO(content.decode("utf-8-sig"), newline=""), skipinitialspace=True
        )
        columns, lines = reader.fieldnames or [], list(reader)
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"labels: {str(path)!r} is no CSV file ({error})") from error
    given = [column for column in ("label", "labels") if column in columns]
    if "file" not in columns or len(given) != 1:
        raise ValueError(
            f"labels: {str(path)!r} must have the columns file and either label (one class) or labels (several, with "
            f"{SEPARATOR} between); got {', '.join(columns) or 'none'}"
        )
    several = given == ["labels"]
    return [_row(path, number, line, given[0]) for number, line in enumerate(lines, 2)], several


def _row(path: Path, number: int, line: dict, column: str) -> tuple[str, list[str], str]:
    text, word = line[column] or "", (line.get("split") or "train").strip()
    names = (
        [name.strip() for name in text.split(SEPARATOR)] if column == "labels" else [text.strip()]
    )
    names = list(dict.fromkeys(name for name in names if name))
    if column == "label" and not names:
        raise ValueError(f"labels: line {number} of {str(path)!r} has no label")
    if word not in SPLIT_OF:
        raise ValueError(
            f"labels: line {number} of {str(path)!r}: split must be train, val or test, got {word!r}"
        )
    return (line["file"] or "").strip().replace("\\", "/").removeprefix("./"), names, SPLIT_OF[word]


def _check_rows(path: Path, rows: list[tuple], files: set[str]) -> None:
    names = [name for name, _, _ in rows]
    if not names:
        raise ValueError(f"labels: {str(path)!r} has no rows")
    missing = [name for name in names if name not in files]
    if missing:
        near = get_close_matches(missing[0], files, n=1) if len(files) < 10_000 else []
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(
            f"labels: {len(missing)} files of {str(path)!r} are no images in root, the first is {missing[0]!r}{hint}"
        )
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"labels: {str(path)!r} names {twice!r} twice")


def _in_order(names: set[str]) -> list[str]:
    """Sorted; as numbers, where all are."""
    return (
        sorted(names, key=int)
        if all(name.isascii() and name.isdigit() for name in names)
        else sorted(names)
    )


def _part(
    store: Folder | Archive, rows: list[tuple], classes: list[str], several: bool, unnamed
) -> FileImages:
    number = {name: index for index, name in enumerate(classes)}
    if several:
        labels = np.zeros((len(rows), len(classes)), dtype=np.uint8)
        for row, (_, names, _) in enumerate(rows):
            labels[row, [number[name] for name in names]] = 1
    else:
        labels = np.array([number[names[0]] for _, names, _ in rows], dtype=np.int64)
    return FileImages(store, [name for name, _, _ in rows], labels, classes, unnamed)
