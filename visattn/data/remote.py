"""Tar shards behind a URL: webdataset fetches each once, then they are read as local ones."""

import logging
import os
import re
import tarfile
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from rich.console import Console
from rich.progress import track

from visattn.data.shards import ShardImages, find_shards, list_shards
from visattn.data.source import SourceOptions, SourceType
from visattn.data.tar_index import CLASSES, INDEX, write_index

# of those webdataset opens: none that runs a command of the URL's choice
SCHEMES = ("http", "https", "gs", "hf")
_log = logging.getLogger(__name__)


def is_remote(root: str | os.PathLike | None) -> bool:
    """Whether ``root`` is a URL."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", str(root or "")) is not None


def fetch_shards(root: str, download: bool = False) -> Path:
    """The local folder with the shards of a URL, braces expanded; fetches missing ones."""
    try:
        import webdataset
        from filelock import FileLock
    except ImportError as error:
        reason = "needs the packages webdataset and filelock: pip install 'visattn[shards]'"
        raise ImportError(f"root: {root!r} {reason}") from error

    # the checksum separates URLs of similar paths, and no secret of a URL gets into a name
    checksum = zlib.crc32(root.encode())
    folder = Path("data") / f"{_plain_name(urlsplit(root).path)[-80:]}-{checksum:08x}"
    urls = webdataset.shardlists.expand_urls(root)
    urls_by_path = _local_paths(root, urls, folder)
    if not download:
        missing = _missing_files(urls_by_path)
        if missing:
            raise FileNotFoundError(
                f"root: {len(missing)} of {len(urls_by_path)} shards of {root!r} are not in "
                f"{str(folder)!r}; set download: true to fetch them from the network"
            )
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / ".lock"):  # all processes of a training come here at once
        if _missing_files([*urls_by_path, folder / INDEX]):
            _fetch_missing(webdataset, root, urls_by_path, folder)
    return folder


def _missing_files(paths: Iterable[Path]) -> list[Path]:
    return [path for path in paths if not path.is_file()]


def _local_paths(root: str, urls: list[str], folder: Path) -> dict[Path, str]:
    """The URL of each shard by its local path; refuses URLs that cannot be opened or told apart."""
    base = _base_path(root)
    urls_by_path = {}
    for url in urls:
        parts = urlsplit(url)
        if parts.scheme not in SCHEMES or not parts.path.endswith(".tar") or "::" in url:
            raise ValueError(
                f"root: {url!r} is not the URL of a tar shard: it must begin with "
                f"{', '.join(SCHEMES)}, and its path end with .tar, as in "
                "https://HOST/train-{000..007}.tar"
            )
        name = _plain_name(parts.path.removeprefix(base))
        urls_by_path[folder / name] = url
    if len(urls_by_path) < len(urls):
        raise ValueError(
            f"root: {root!r} names {len(urls)} shards, but only {len(urls_by_path)} different paths"
        )
    return urls_by_path


def _fetch_missing(webdataset: Any, root: str, urls_by_path: dict[Path, str], folder: Path) -> None:
    """Fetch the class names and the missing shards, then write the index."""
    for leftover in folder.glob("*.part*"):  # of an interrupted run
        leftover.unlink()
    if not (folder / CLASSES).is_file():
        _fetch_classes(webdataset, root, folder / CLASSES)
    console = Console(stderr=True)
    missing = track(
        _missing_files(urls_by_path),
        "fetching",
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    for path in missing:
        _fetch_shard(webdataset, urls_by_path[path], path)
    write_index(folder, find_shards(folder))


def _fetch_shard(webdataset: Any, url: str, path: Path) -> None:
    """Fetch one shard under another name, which is changed once it is complete."""
    part = path.with_name(f"{path.name}.part")
    try:
        webdataset.cache.download(url, str(part))
    except (OSError, ValueError) as error:
        raise FileNotFoundError(f"root: cannot fetch {url!r}: {error}") from error
    if not tarfile.is_tarfile(part):
        raise ValueError(f"root: {url!r} returns no tar file")
    part.replace(path)


def _fetch_classes(webdataset: Any, root: str, target: Path) -> None:
    """The list of class names that ``visattn pack`` writes beside its shards; others have none."""
    url = urlsplit(root)._replace(path=_base_path(root) + CLASSES).geturl()
    part = target.with_name(f"{CLASSES}.part")
    try:
        webdataset.cache.download(url, str(part))
        # an empty file, or the page that a server sends in place of one
        if re.search(r"^\s*$|<", part.read_text(encoding="utf-8")):
            raise ValueError("it is not a list of names")
        part.replace(target)
    except (OSError, ValueError) as error:
        _log.warning("no %s: classes are named by the labels of the shards: %s", CLASSES, error)


def _base_path(root: str) -> str:
    """The folder that the paths of all shards begin with."""
    fixed = urlsplit(root).path.partition("{")[0]
    return fixed[: fixed.rfind("/") + 1]


def _plain_name(text: str) -> str:
    """The text with letters, digits, dots and hyphens only, else underscores."""
    return re.sub(r"[^A-Za-z0-9.-]+", "_", text).strip("_.")


def _matches(options: SourceOptions) -> bool:
    return options.dataset is None and is_remote(options.root)


def _list_splits(options: SourceOptions) -> dict[str, ShardImages]:
    return list_shards(fetch_shards(options.require_root(), options.download))


REMOTE_SHARDS = SourceType(
    "tar shards by URL",
    _matches,
    _list_splits,
    download=_list_splits,
)
