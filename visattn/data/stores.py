"""Where image files lie: a folder or a zip. A store lists its files and reads one of them."""

import os
import zipfile
from difflib import get_close_matches
from pathlib import Path

_JUNK = frozenset({"__macosx", "thumbs.db", "desktop.ini"})


class Folder:
    """The files below a folder."""

    def __init__(self, path: Path):
        self.path = path

    def entries(self) -> tuple[list[str], list[str]]:
        """Relative paths of all files and of all folders, sorted, junk of operating systems left out."""
        files, folders = [], []
        waiting = [""]
        while waiting:
            prefix = waiting.pop()
            with os.scandir(self.path / prefix) as found:
                for entry in found:
                    if _is_junk(entry.name):
                        continue
                    if entry.is_dir():
                        waiting.append(f"{prefix}{entry.name}/")
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
    """The files inside a zip; every process opens its own handle, since a shared one corrupts reads."""

    def __init__(self, path: Path):
        self.path = path
        self._handle, self._process = None, None

    def entries(self) -> tuple[list[str], list[str]]:
        """Relative paths of all files and of all folders, sorted, junk of operating systems left out."""
        try:
            with zipfile.ZipFile(self.path) as archive:
                names = archive.namelist()
        except zipfile.BadZipFile as error:
            raise ValueError(f"{str(self.path)!r} is not a readable zip file ({error})") from error
        names = [name for name in names if not any(map(_is_junk, name.rstrip("/").split("/")))]
        files = [name for name in names if not name.endswith("/")]
        folders = {name.rstrip("/") for name in names if name.endswith("/")}
        for parent in {name.rpartition("/")[0] for name in files}:
            while parent:
                folders.add(parent)
                parent = parent.rpartition("/")[0]
        return sorted(files), sorted(folders)

    def read(self, name: str) -> bytes:
        """The bytes of one file."""
        if self._process != os.getpid():
            self._handle, self._process = zipfile.ZipFile(self.path), os.getpid()
        return self._handle.read(name)

    def __getstate__(self) -> dict:
        return {"path": self.path, "_handle": None, "_process": None}


def open_store(root: str | os.PathLike, argument: str = "root") -> Folder | Archive:
    """The folder or zip file at ``root``; an error names the argument that was wrong."""
    path = Path(root)
    if path.is_dir():
        return Folder(path)
    if path.is_file():
        return Archive(path)
    beside = os.listdir(path.parent) if path.parent.is_dir() else []
    near = get_close_matches(path.name, beside, n=1)
    hint = f"; did you mean {str(path.parent / near[0])!r}?" if near else ""
    raise FileNotFoundError(f"{argument}: there is no folder or zip file {str(path)!r}{hint}")


def _is_junk(name: str) -> bool:
    return name.startswith(".") or name.lower() in _JUNK
