"""Folders and zips of files behind one interface: list the files, read one of them."""

import os
import zipfile
from difflib import get_close_matches
from pathlib import Path
from typing import Any

# what operating systems leave in folders, in lower case
_JUNK = frozenset({"__macosx", "thumbs.db", "desktop.ini"})


class Folder:
    """The files below a folder."""

    def __init__(self, path: Path):
        self.path = path

    def entries(self) -> tuple[list[str], list[str]]:
        """Relative paths of files and of folders, sorted, without junk of operating systems."""
        files = []
        folders = []
        pending = [""]
        while pending:
            prefix = pending.pop()
            with os.scandir(self.path / prefix) as entries:
                for entry in entries:
                    if _is_junk(entry.name):
                        continue
                    if entry.is_dir():
                        pending.append(f"{prefix}{entry.name}/")
                        folders.append(f"{prefix}{entry.name}")
                    else:
                        files.append(prefix + entry.name)
        files.sort()
        folders.sort()
        return files, folders

    def read(self, name: str) -> bytes:
        """The bytes of one file."""
        return (self.path / name).read_bytes()


class Archive:
    """The files inside a zip.

    Each process opens its own handle, since a shared one corrupts reads.
    """

    def __init__(self, path: Path):
        self.path = path
        self._handle: zipfile.ZipFile | None = None
        self._process_id: int | None = None

    def entries(self) -> tuple[list[str], list[str]]:
        """Relative paths of files and of folders, sorted, without junk of operating systems."""
        try:
            with zipfile.ZipFile(self.path) as archive:
                names = archive.namelist()
        except zipfile.BadZipFile as error:
            raise ValueError(f"{str(self.path)!r} is not a readable zip file ({error})") from error
        files = []
        folders = set()
        for name in names:
            if any(map(_is_junk, name.rstrip("/").split("/"))):
                continue
            if name.endswith("/"):
                folders.add(name.rstrip("/"))
            else:
                files.append(name)
        # a zip need not list the folders of its files
        for parent in {name.rpartition("/")[0] for name in files}:
            while parent:
                folders.add(parent)
                parent = parent.rpartition("/")[0]
        return sorted(files), sorted(folders)

    def read(self, name: str) -> bytes:
        """The bytes of one file."""
        if self._handle is None or self._process_id != os.getpid():
            self._handle = zipfile.ZipFile(self.path)
            self._process_id = os.getpid()
        return self._handle.read(name)

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "_handle": None, "_process_id": None}


def open_store(root: str | os.PathLike, argument: str = "root") -> Folder | Archive:
    """The folder or zip file at ``root``; an error names the wrong ``argument``."""
    path = Path(root)
    if path.is_dir():
        return Folder(path)
    if path.is_file():
        return Archive(path)
    siblings = os.listdir(path.parent) if path.parent.is_dir() else []
    # only a near name helps here: a folder may hold thousands
    matches = get_close_matches(path.name, siblings, n=1)
    hint = f"; did you mean {str(path.parent / matches[0])!r}?" if matches else ""
    raise FileNotFoundError(f"{argument}: there is no folder or zip file {str(path)!r}{hint}")


def _is_junk(name: str) -> bool:
    return name.startswith(".") or name.lower() in _JUNK
