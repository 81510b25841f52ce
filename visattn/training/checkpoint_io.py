"""Checkpoints: what they hold beside the weights, and how they are written, found and read."""

import errno
import os
from pathlib import Path

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

FORMAT = 1
KEY = "visattn"
LATEST = ("last", "previous")  # the one before the last is kept beside it
LAST, PREVIOUS = "last.ckpt", "previous.ckpt"


class AtomicCheckpointIO(TorchCheckpointIO):
    """Write a checkpoint so that neither a kill nor a full disk can damage the one that was there.

    Lightning writes into the system's temporary folder and moves the file, which copies it wherever
    the run lies on another disk; a kill then leaves half a file. When last.ckpt is written, the one
    before stays as previous.ckpt.

    Raises:
        OSError: The disk is full; what was saved before is untouched.
    """

    def save_checkpoint(self, checkpoint: dict, path, storage_options=None) -> None:
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name}.partial")
        try:
            with partial.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
        except (
            OSError,
            RuntimeError,
        ) as error:  # torch says RuntimeError where its writer comes to a full disk
            partial.unlink(missing_ok=True)
            reason = os.strerror(getattr(error, "errno", None) or errno.ENOSPC)
            raise OSError(
                f"{path} could not be saved: {reason}; what was saved before stays"
            ) from error
        if path.name == LAST and path.exists():
            os.replace(path, path.with_name(PREVIOUS))
        os.replace(partial, path)


def find_checkpoint(run: str | Path, which: str = "best") -> Path:
    """Return the file of ``which`` ("best" or "last") in a run's folder, or of another where that one is missing."""
    folder = Path(run) / "checkpoints"
    for name in ("best", *LATEST) if which == "best" else (*LATEST, "best"):
        if (folder / f"{name}.ckpt").is_file():
            return folder / f"{name}.ckpt"
    raise FileNotFoundError(
        f"{folder} holds no checkpoint (best.ckpt or last.ckpt): has this run been trained?"
    )


def read_checkpoint(path: str | Path) -> dict:
    """Return the content of a checkpoint, refusing what is damaged, of another project or of a newer version."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint {path} does not exist")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises a dozen types for damaged and foreign files
        raise ValueError(
            f"{path} is damaged or no checkpoint of visattn ({type(error).__name__})"
        ) from error
    note = content.get(KEY) if isinstance(content, dict) else None
    if not isinstance(note, dict) or "state_dict" not in content:
        raise ValueError(
            f"{path} is a checkpoint of another project: it does not say how visattn rebuilds its model"
        )
    if note["format"] > FORMAT:
        raise ValueError(
            f"{path} has format {note['format']}, this visattn reads up to {FORMAT}: install a newer one"
        )
    return content


def readable_checkpoint(run: str | Path, which: str) -> tuple[Path, str]:
    """Return the first readable checkpoint of a run, asked for first, and what was wrong with the ones passed over."""
    first = find_checkpoint(run, which)
    problems = []
    others = [Path(run) / "checkpoints" / f"{name}.ckpt" for name in (*LATEST, "best")]
    for path in dict.fromkeys((first, *(path for path in others if path.is_file()))):
        try:
            read_checkpoint(path)
            return path, "; ".join(problems)
        except ValueError as error:
            problems.append(str(error))
    raise ValueError("; ".join(problems))
