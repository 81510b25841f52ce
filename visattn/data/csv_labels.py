"""Labels from a CSV file beside the images, in place of class folders."""

import csv
import io
import os
from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path
from typing import NamedTuple

import numpy as np

from visattn.data.images import FileImages, is_image
from visattn.data.source import SPLIT_OF, SourceOptions, SourceType
from visattn.data.stores import Archive, Folder, open_store

SEPARATOR = ";"
_FIRST_ROW = 2  # line number of the first row after the header
_LONGEST_SEARCH = 10_000  # files among which a similar name is looked for


class LabelRow(NamedTuple):
    """One row of the file."""

    file: str
    classes: list[str]
    split: str


def list_table(root: str | os.PathLike, table: str | os.PathLike) -> dict[str, FileImages]:
    """Images of a folder or zip, labeled by a CSV file.

    Its columns are ``file``, the path within the root; ``label``, one class, or ``labels``, any
    number of classes separated by semicolons; and optionally ``split``: train, val or test.
    """
    store = open_store(root)
    files, _ = store.entries()
    path, content = _read_table(store, files, table)
    rows, multilabel = _parse_rows(path, content)
    images = {name for name in files if is_image(name)}
    _check_files(path, [row.file for row in rows], images)
    class_names: set[str] = set()
    for row in rows:
        class_names.update(row.classes)
    classes = _sort_classes(class_names)
    if len(classes) < 2:
        raise ValueError(
            f"labels: {str(path)!r} must name at least two classes, got {classes or 'none'}"
        )
    # images that the table does not name are reported, not used
    unlabeled = sorted(images - {row.file for row in rows})
    rows_by_split: dict[str, list[LabelRow]] = {}
    for row in rows:
        rows_by_split.setdefault(row.split, []).append(row)
    if "train" not in rows_by_split:
        raise ValueError(f"labels: {str(path)!r} has no row whose split is train")
    splits = {}
    for split, split_rows in rows_by_split.items():
        # listed once, not with every split
        ignored = unlabeled if split == "train" else []
        splits[split] = _label_files(store, split_rows, classes, multilabel, ignored)
    return splits


def _read_table(
    store: Folder | Archive, files: list[str], table: str | os.PathLike
) -> tuple[Path, bytes]:
    """Path and content of the table: a file, or one in the root, also where that is a zip."""
    path = Path(table)
    if path.is_file():
        return path, path.read_bytes()
    path_in_root = store.path / table
    if path_in_root.is_file():
        return path_in_root, path_in_root.read_bytes()
    if path.as_posix() in files:
        return path_in_root, store.read(path.as_posix())
    raise FileNotFoundError(
        f"labels: there is no file {str(table)!r}, neither in the current folder nor in root "
        f"{str(store.path)!r}"
    )


def _parse_rows(path: Path, content: bytes) -> tuple[list[LabelRow], bool]:
    """The rows, and whether a row may name several classes."""
    try:
        text = content.decode("utf-8-sig")  # spreadsheets begin with a byte order mark
        reader = csv.DictReader(io.StringIO(text, newline=""), skipinitialspace=True)
        columns = reader.fieldnames or []
        lines = list(reader)
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"labels: {str(path)!r} is no CSV file ({error})") from error
    label_columns = [column for column in ("label", "labels") if column in columns]
    if "file" not in columns or len(label_columns) != 1:
        raise ValueError(
            f"labels: {str(path)!r} must have the columns file and either label (one class) or "
            f"labels (any number, separated by {SEPARATOR}); got {', '.join(columns) or 'none'}"
        )
    multilabel = label_columns == ["labels"]
    rows = []
    for number, line in enumerate(lines, _FIRST_ROW):
        rows.append(_parse_row(line, multilabel, f"line {number} of {str(path)!r}"))
    return rows, multilabel


def _parse_row(line: dict[str, str], multilabel: bool, location: str) -> LabelRow:
    """One row; ``location`` is what errors call it."""
    if multilabel:
        names = (line["labels"] or "").split(SEPARATOR)
    else:
        names = [line["label"] or ""]
    # without blanks and repetitions, in the order of the row
    names = [name.strip() for name in names]
    classes = list(dict.fromkeys(filter(None, names)))
    if not multilabel and not classes:
        raise ValueError(f"labels: {location} has no label")
    split = (line.get("split") or "train").strip()
    if split not in SPLIT_OF:
        raise ValueError(f"labels: {location}: split must be train, val or test, got {split!r}")
    file = (line["file"] or "").strip()
    # paths of Windows, and of `find`
    file = file.replace("\\", "/").removeprefix("./")
    return LabelRow(file, classes, SPLIT_OF[split])


def _check_files(path: Path, names: list[str], images: set[str]) -> None:
    """Refuse names of no image, and names that occur twice."""
    if not names:
        raise ValueError(f"labels: {str(path)!r} has no rows")
    missing = [name for name in names if name not in images]
    if missing:
        # only a near name helps here, and a search among many takes long
        matches = []
        if len(images) < _LONGEST_SEARCH:
            matches = get_close_matches(missing[0], images, n=1)
        hint = f"; did you mean {matches[0]!r}?" if matches else ""
        raise ValueError(
            f"labels: {len(missing)} files of {str(path)!r} are no images in root, "
            f"the first is {missing[0]!r}{hint}"
        )
    if len(set(names)) < len(names):
        duplicate = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"labels: {str(path)!r} names {duplicate!r} twice")


def _sort_classes(names: set[str]) -> list[str]:
    """In the order of the alphabet, or of numbers where all are numbers."""
    if all(name.isascii() and name.isdigit() for name in names):
        return sorted(names, key=int)
    return sorted(names)


def _label_files(
    store: Folder | Archive,
    rows: list[LabelRow],
    classes: list[str],
    multilabel: bool,
    ignored: Iterable[str],
) -> FileImages:
    """The images of one split with class numbers, or with 0 and 1 for every class."""
    class_numbers = {name: number for number, name in enumerate(classes)}
    numbers = [[class_numbers[name] for name in row.classes] for row in rows]
    if multilabel:
        shape = (len(rows), len(classes))
        labels = np.zeros(shape, dtype=np.uint8)
        for position, row_numbers in enumerate(numbers):
            labels[position, row_numbers] = 1
    else:
        first_numbers = [row_numbers[0] for row_numbers in numbers]
        labels = np.array(first_numbers, dtype=np.int64)
    return FileImages(store, [row.file for row in rows], labels, classes, ignored)


def _matches(options: SourceOptions) -> bool:
    return options.dataset is None and options.labels is not None


def _list_splits(options: SourceOptions) -> dict[str, FileImages]:
    return list_table(options.require_root(), str(options.labels))


CSV_LABELS = SourceType("CSV labels", _matches, _list_splits)
