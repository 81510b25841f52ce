"""Shards that lie elsewhere: webdataset fetches each once, and they are read from the disk as any others."""

import os
import re
from pathlib import Path
from urllib.parse import urlsplit

from rich.console import Console
from rich.progress import track

from visattn.data.shards import CLASSES, shards_in, write_index


def is_remote(root: str | os.PathLike | None) -> bool:
    """Say whether ``root`` is a URL, such as ``https://...`` or ``s3://...``."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", str(root or "")) is not None


def fetched(root: str, download: bool = False) -> Path:
    """The folder with the shards that a URL means, braces expanded; what is not there yet is fetched, if allowed."""
    try:
        import webdataset
    except ImportError as error:
        raise ImportError(
            f"root: shards of {root!r} need the package webdataset: pip install 'visattn[shards]'"
        ) from error

    folder = Path("data") / _plain(root.partition("://")[2])
    urls = webdataset.shardlists.expand_urls(root)
    others = [url for url in urls if not urlsplit(url).path.lower().endswith(".tar")]
    if others:
        raise ValueError(
            f"root: {others[0]!r} is not the URL of a tar shard, such as https://HOST/train-{{000..007}}.tar"
        )
    missing = [url for url in urls if not (folder / _name(url, root)).is_file()]
    if missing and not download:
        raise FileNotFoundError(
            f"root: {len(missing)} of {len(urls)} shards of {root!r} do not lie in {str(folder)!r}; set download: true "
            "to fetch them from the network"
        )
    if missing:
        _fetch(webdataset, root, missing, folder)
    return folder


def _fetch(webdataset, root: str, urls: list[str], folder: Path) -> None:
    names = webdataset.cache.FileCache(str(folder), url_to_name=lambda _: CLASSES, validator=None)
    try:
        names.get_file(f"{_base(root)}{CLASSES}")
    except OSError:
        pass  # without it the labels themselves are the names
    shards = webdataset.cache.FileCache(str(folder), url_to_name=lambda url: _name(url, root))
    watched = Console(stderr=True)
    for url in track(urls, "fetching", console=watched, transient=True, disable=not watched.is_terminal):
        try:
            shards.get_file(url)
        except (OSError, ValueError, AssertionError) as error:
            raise FileNotFoundError(f"root: cannot fetch {url!r} ({error}); those before it are kept") from error
    write_index(folder, shards_in(folder))


def _base(root: str) -> str:
    """What the URLs of all shards begin with, as far as whole folders."""
    fixed = root.partition("{")[0]
    return fixed[: fixed.rindex("/") + 1]


def _name(url: str, root: str) -> str:
    """A shard's file name, with the folders that tell it from the others."""
    return _plain(urlsplit(url).path[len(urlsplit(_base(root)).path) :])


def _plain(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9.-]+", "_", text).strip("_.")
