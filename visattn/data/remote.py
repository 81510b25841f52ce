"""Shards that lie elsewhere: webdataset fetches each once, and they are read from the disk as any others."""

import logging
import os
import re
import tarfile
import zlib
from pathlib import Path
from urllib.parse import urlsplit

from rich.console import Console
from rich.progress import track

from visattn.data.shards import CLASSES, INDEX, shards_in, write_index

SCHEMES = (
    "http",
    "https",
    "gs",
    "hf",
)  # of those webdataset opens: none that runs a command of the URL's choice
_log = logging.getLogger(__name__)


def is_remote(root: str | os.PathLike | None) -> bool:
    """Say whether ``root`` is a URL."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", str(root or "")) is not None


def fetched(root: str, download: bool = False) -> Path:
    """The folder with the shards that a URL means, braces expanded; what is not there yet is fetched, if allowed."""
    try:
        import webdataset
        from filelock import FileLock
    except ImportError as error:
        reason = "needs the packages webdataset and filelock: pip install 'visattn[shards]'"
        raise ImportError(f"root: {root!r} {reason}") from error

    # its check sum tells it from others of a similar path, and keeps what may be secret in a URL
    # out of names
    folder = Path("data") / f"{_plain(urlsplit(root).path)[-80:]}-{zlib.crc32(root.encode()):08x}"
    shards = _places(root, webdataset.shardlists.expand_urls(root), folder)
    if not download:
        missing = [place for place in shards if not place.is_file()]
        if missing:
            raise FileNotFoundError(
                f"root: {len(missing)} of {len(shards)} shards of {root!r} do not lie in {str(folder)!r}; set "
                "download: true to fetch them from the network"
            )
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / ".lock"):  # the processes of a training come here together
        if not all(place.is_file() for place in (*shards, folder / INDEX)):
            _fetch(webdataset, root, shards, folder)
    return folder


def _places(root: str, urls: list[str], folder: Path) -> dict[Path, str]:
    """Where each shard is to lie, and its URL; what no file can be told apart by, or nothing can open, is refused."""
    for url in urls:
        parts = urlsplit(url)
        if parts.scheme not in SCHEMES or not parts.path.endswith(".tar") or "::" in url:
            raise ValueError(
                f"root: {url!r} is not the URL of a tar shard: it must begin with {', '.join(SCHEMES)}, and its path "
                "end with .tar, as in https://HOST/train-{000..007}.tar"
            )
    places = {folder / _plain(urlsplit(url).path.removeprefix(_base(root))): url for url in urls}
    if len(places) < len(urls):
        raise ValueError(
            f"root: {root!r} means {len(urls)} shards with {len(places)} different paths between them"
        )
    return places


def _fetch(webdataset, root: str, shards: dict[Path, str], folder: Path) -> None:
    for left in folder.glob("*.part*"):  # by an interrupted run
        left.unlink()
    if not (folder / CLASSES).is_file():
        _fetch_classes(webdataset, root, folder / CLASSES)
    watched = Console(stderr=True)
    missing = [place for place in shards if not place.is_file()]
    for place in track(
        missing, "fetching", console=watched, transient=True, disable=not watched.is_terminal
    ):
        part = place.with_name(f"{place.name}.part")
        try:
            webdataset.cache.download(shards[place], str(part))
        except (OSError, ValueError) as error:
            raise FileNotFoundError(f"root: cannot fetch {shards[place]!r}: {error}") from error
        if not tarfile.is_tarfile(part):
            raise ValueError(f"root: what {shards[place]!r} gives is no tar file")
        part.replace(place)
    write_index(folder, shards_in(folder))


def _fetch_classes(webdataset, root: str, target: Path) -> None:
    """The list of class names that ``visattn pack`` writes beside its shards; others' have none."""
    url = urlsplit(root)._replace(path=_base(root) + CLASSES).geturl()
    part = target.with_name(f"{CLASSES}.part")
    try:
        webdataset.cache.download(url, str(part))
        if re.search(r"^\s*$|<", part.read_text(encoding="utf-8")):
            raise ValueError("it is no list of names")
        part.replace(target)
    except (OSError, ValueError) as error:
        _log.warning("classes are named as in the shards, for there is no %s: %s", CLASSES, error)


def _base(root: str) -> str:
    """The folder that the paths of all shards begin with."""
    fixed = urlsplit(root).path.partition("{")[0]
    return fixed[: fixed.rfind("/") + 1]


def _plain(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9.-]+", "_", text).strip("_.")
