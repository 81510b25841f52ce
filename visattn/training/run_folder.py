"""The folder of a run: where it is, how it is claimed, and its config.yaml and metrics.csv."""

import csv
import errno
import os
import tempfile
from pathlib import Path
from typing import Any

from jsonargparse import Namespace
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.logger import rank_zero_experiment

from visattn.training.parser import command_parser


def folder_of(config: Namespace) -> Path:
    """Return the folder of the run that a configuration describes."""
    folder = Path(config.out or Path("runs", config.name))
    if config.trainer.fast_dev_run:  # a trial of the code must neither overwrite nor move a run
        return folder.with_name(f"{folder.name}.trial")
    return folder


def claim(folder: Path, resumed: bool) -> str:
    """Make the folder of a run, check that it is writable, and move an earlier run there aside.

    Return a notice of the move, or "". Call it only once model, data and trainer exist: a misspelt
    key must never move a run.
    """
    notice = ""
    if not resumed and any((folder / "checkpoints").glob("*.ckpt")):
        new_place = _free_name(folder)
        folder.rename(new_place)
        notice = f"{folder} held an earlier run, now {new_place}"
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


def _free_name(folder: Path) -> Path:
    """Return the first of folder.1, folder.2, ... that does not exist."""
    number = 1
    while folder.with_name(f"{folder.name}.{number}").exists():
        number += 1
    return folder.with_name(f"{folder.name}.{number}")


def save_config(folder: Path, config: Namespace) -> None:
    """Write config.yaml without ``ckpt_path``: a new run of it starts anew."""
    saved = config.clone()
    saved.ckpt_path = None
    command_parser("fit").save(
        saved,
        folder / "config.yaml",
        skip_none=False,
        overwrite=True,
        multifile=False,
    )


class RunLogger(CSVLogger):
    """Write metrics.csv into the run's folder; after a resume the rows up to the resumed step stay.

    Args:
        folder: The run's folder.
        resumed_step: Step of the checkpoint that training resumes from, or None for a new run.
    """

    def __init__(self, folder: Path, resumed_step: int | None = None):
        super().__init__(folder, name="", version="", flush_logs_every_n_steps=50)
        self._earlier_rows: list[dict[str, Any]] = []
        if resumed_step is not None:
            self._earlier_rows = read_metrics(folder / "metrics.csv", resumed_step)

    @property
    @rank_zero_experiment
    def experiment(self):
        writer = super().experiment
        if self._earlier_rows:
            writer.metrics.extend(self._earlier_rows)
            self._earlier_rows = []
        return writer


def read_metrics(path: Path, end_step: int | None = None) -> list[dict[str, Any]]:
    """Return the rows of metrics.csv before ``end_step`` (None: all), without empty cells."""
    if not path.is_file():
        return []
    rows: list[dict[str, Any]] = []
    with path.open(newline="") as file:
        for cells in csv.DictReader(file):
            row: dict[str, Any] = {key: float(value) for key, value in cells.items() if value}
            row["step"] = int(row.get("step", 0))
            if end_step is None or row["step"] < end_step:
                rows.append(row)
    return rows
