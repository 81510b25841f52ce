"""From which checkpoint a command starts, and what has changed since the run was stopped."""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from visattn.training.checkpoint_io import (
    KEY,
    find_checkpoint,
    read_checkpoint,
    readable_checkpoint,
)

START_ANEW = "or start anew from its weights: --model.weights CHECKPOINT"

# Keys that say where a run lies and how it goes on, not what it is.
UNCOMPARED_KEYS = (
    "ckpt_path",
    "config",
    "out",
    "name",
    "trainer.callbacks",
    "verbose",
    "weights_only",
)


@dataclass(frozen=True)
class StartingPoint:
    """The checkpoint that a command starts from, its training step and its classes."""

    path: Path
    step: int
    classes: list[str]
    notice: str = ""


def read_starting_point(
    folder: Path,
    ckpt_path: str | None,
    command: str,
) -> StartingPoint | None:
    """Read the checkpoint that a command starts from, or return None where it starts from none."""
    path, problem = choose_checkpoint(folder, ckpt_path, command)
    if path is None:
        return None
    content = read_checkpoint(path)
    notice = f"{problem}; using {path}" if problem else ""
    return StartingPoint(path, content["global_step"], list(content[KEY]["classes"]), notice)


def choose_checkpoint(
    folder: Path,
    ckpt_path: str | None,
    command: str,
) -> tuple[Path | None, str]:
    """Return the checkpoint meant by ``--ckpt_path``, and what was wrong with those passed over.

    Without the key, fit and tune start from none (a job that SLURM started again: from the last),
    the other commands from the best.
    """
    choice = ckpt_path or _default_choice(folder, command)
    if choice is None:
        return None, ""
    if choice == "none" and command != "fit":
        return None, ""
    if choice in ("best", "last"):
        return readable_checkpoint(folder, choice)
    path = Path(choice)
    if path.is_dir():
        path = find_checkpoint(path, "last" if command == "fit" else "best")
    return path, ""


def _default_choice(folder: Path, command: str) -> str | None:
    if command in ("validate", "test", "predict"):
        return "best"
    has_checkpoints = any((folder / "checkpoints").glob("*.ckpt"))
    if command == "fit" and is_requeued() and has_checkpoints:
        return "last"
    return None


def belongs_to_run(folder: Path, checkpoint: Path) -> bool:
    """Whether a checkpoint is one of the run in ``folder``, so that training resumes there."""
    checkpoints = (folder / "checkpoints").resolve()
    if checkpoint.parent.resolve() == checkpoints:
        return True
    inside_run = folder.resolve() in checkpoint.resolve().parents
    if inside_run and any(checkpoints.glob("*.ckpt")):
        raise ValueError(
            f"ckpt_path: {checkpoint} would move aside with the run in {folder}; "
            f"put it into {checkpoints}"
        )
    return False


def is_requeued() -> bool:
    """Whether SLURM has started this job before."""
    return int(os.environ.get("SLURM_RESTART_COUNT") or 0) > 0


def list_changes(folder: Path, config: dict[str, Any]) -> list[str]:
    """Return a line per key whose value differs from the run's config.yaml."""
    try:
        saved_config = yaml.safe_load((folder / "config.yaml").read_text()) or {}
        before = dict(_flatten(saved_config))
    except (OSError, yaml.YAMLError, AttributeError):  # a run without its config can go on too
        return []
    now = dict(_flatten(json.loads(json.dumps(config, default=str))))
    lines = []
    for key in sorted(before.keys() & now.keys()):
        if before[key] != now[key] and not key.startswith(UNCOMPARED_KEYS):
            lines.append(f"{key}: {before[key]} -> {now[key]}")
    return lines


def _flatten(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield ("model.lr", value) for each leaf of nested dictionaries."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def refuse_other_optimizer(
    checkpoint: dict[str, Any],
    groups: list[dict[str, Any]],
    optimizer: str,
) -> None:
    """Raise where a checkpoint's optimizer state does not fit the parameter groups ``groups``."""
    saved_optimizer = checkpoint[KEY].get("optimizer", optimizer)
    if saved_optimizer != optimizer:
        raise ValueError(
            f"the checkpoint holds the state of optimizer {saved_optimizer!r}, not {optimizer!r}; "
            f"{START_ANEW}"
        )
    for state in checkpoint.get("optimizer_states", ()):
        if not _groups_match(state["param_groups"], groups):
            raise ValueError(
                "the checkpoint's optimizer groups other weights: freeze, unfreeze_epoch and "
                f"whether layer_decay is below 1 must stay as they were; {START_ANEW}"
            )


def _groups_match(saved: list[dict[str, Any]], current: list[dict[str, Any]]) -> bool:
    saved_sizes = [len(group["params"]) for group in saved]
    current_sizes = [len(group["params"]) for group in current]
    if saved_sizes != current_sizes:
        return False
    saved_names = [group.get("param_names") for group in saved]
    if None in saved_names:  # checkpoints of an earlier version
        return True
    return saved_names == [group.get("param_names") for group in current]
