"""Checkpoints: what they hold beside the weights, and how they are written, found and read."""

import os
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

FORMAT = 1
KEY = "visattn"
LAST = "last.ckpt"
PREVIOUS = "previous.ckpt"  # the one before the last
BEST = "best.ckpt"


class AtomicCheckpointIO(TorchCheckpointIO):
    """Write a checkpoint so that neither a kill nor a full disk can damage the one that was there.

    Lightning writes into the system's temporary folder and moves the file, which copies it wherever
    the run is on another disk; a kill then leaves half a file. When last.ckpt is written, the one
    before stays as previous.ckpt.

    Raises:
        OSError: The file cannot be written, for instance to a full disk; earlier checkpoints are
            untouched.
    """

    def save_checkpoint(
        self,
        checkpoint: dict[str, Any],
        path: str | os.PathLike,
        storage_options: Any = None,
    ) -> None:
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name}.partial")
        try:
            with partial.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
        except (OSError, RuntimeError) as error:
            partial.unlink(missing_ok=True)
            raise OSError(
                f"{path} could not be saved: {_write_error(error)}; earlier checkpoints remain"
            ) from error
        if path.name == LAST and path.exists():
            os.replace(path, path.with_name(PREVIOUS))
        os.replace(partial, path)


def _write_error(error: OSError | RuntimeError) -> str:
    """Return why a file could not be written."""
    if isinstance(error, OSError) and error.errno is not None:
        return os.strerror(error.errno)
    # torch's writer turns the system's error into a RuntimeError without its number.
    lines = str(error).splitlines()
    return f"{lines[0] if lines else type(error).__name__} (is the disk full?)"


def find_checkpoint(run: str | Path, which: str = "best") -> Path:
    """Return the checkpoint "best" or "last" of a run, or another where that one is missing."""
    folder = Path(run) / "checkpoints"
    names = (LAST, PREVIOUS, BEST)
    if which == "best":
        names = (BEST, LAST, PREVIOUS)
    for name in names:
        path = folder / name
        if path.is_file():
            return path
    raise FileNotFoundError(
        f"{folder} holds no checkpoint (best.ckpt or last.ckpt): has this run been trained?"
    )


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Return the content of a checkpoint.

    Raises:
        ValueError: It is damaged, of another project or of a newer version.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint {path} does not exist")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises a dozen types for damaged and foreign files
        raise ValueError(
            f"{path} is damaged or no checkpoint of visattn ({type(error).__name__})"
        ) from error
    note = None
    if isinstance(content, dict):
        note = content.get(KEY)
    if not isinstance(note, dict) or "state_dict" not in content:
        raise ValueError(
            f"{path} is a checkpoint of another project: "
            "it does not say how visattn rebuilds its model"
        )
    refuse_newer_format(path, note)
    return content


def refuse_newer_format(path: Path, note: dict[str, Any]) -> None:
    """Raise where a file was written by a newer version than this one can read."""
    if note["format"] > FORMAT:
        raise ValueError(
            f"{path} has format {note['format']}, this visattn reads up to {FORMAT}: "
            "install a newer one"
        )


def readable_checkpoint(run: str | Path, which: str) -> tuple[Path, str]:
    """Return a run's first readable checkpoint from ``which`` on, and the others' faults."""
    folder = Path(run) / "checkpoints"
    paths = [find_checkpoint(run, which)]
    for name in (LAST, PREVIOUS, BEST):
        path = folder / name
        if path.is_file() and path not in paths:
            paths.append(path)
    problems: list[str] = []
    for path in paths:
        try:
            read_checkpoint(path)
        except ValueError as error:
            problems.append(str(error))
        else:
            return path, "; ".join(problems)
    raise ValueError("; ".join(problems))
