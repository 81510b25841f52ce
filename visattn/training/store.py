"""Store: checkpoints are written beside the old one and take its place whole; the one before the last stays."""

import errno
import os
from pathlib import Path

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

LAST, PREVIOUS = "last.ckpt", "previous.ckpt"


class Store(TorchCheckpointIO):
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
