"""The folder of a run: where it lies, what is kept of an earlier one, and how its training went."""

import csv
import errno
import os
import tempfile
from pathlib import Path

from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities import rank_zero_only


def claim(folder: Path, resumed: bool) -> str:
    """Make the folder of a run writable before any work is done; an earlier run there steps aside. Return a notice."""
    notice = ""
    if not resumed and any((folder / "checkpoints").glob("*.ckpt")):
        number = next(
            i for i in range(1, 10**6) if not folder.with_name(f"{folder.name}.{i}").exists()
        )
        notice = f"{folder} held an earlier run, now {folder.rename(folder.with_name(f'{folder.name}.{number}'))}"
    try:
        (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        reason = os.strerror(error.errno or errno.EIO)
        raise OSError(
            f"cannot write the run to {folder}: {reason}; name another folder with --out"
        ) from error
    return notice


class RunLogger(CSVLogger):
    """Write metrics.csv into the run's folder; after a resume the rows up to the resumed step stay.

    Args:
        folder: The run's folder.
        resumed_step: Step of the checkpoint that training goes on from, or None for a new run.
    """

    def __init__(self, folder: Path, resumed_step: int | None = None):
        super().__init__(folder, name="", version="", flush_logs_every_n_steps=50)
        self._kept = (
            read_metrics(folder / "metrics.csv", resumed_step) if resumed_step is not None else []
        )

    @property
    def experiment(self):
        writer = super().experiment
        if self._kept and rank_zero_only.rank == 0:
            writer.metrics.extend(self._kept)
            self._kept = []
        return writer


def read_metrics(path: Path, last_step: int) -> list[dict]:
    """Return the rows of metrics.csv up to a step."""
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        rows = [
            {key: float(value) for key, value in row.items() if value}
            for row in csv.DictReader(file)
        ]
    return [{**row, "step": int(row["step"])} for row in rows if row.get("step", 0) < last_step]
