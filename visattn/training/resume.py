"""Going on with a run: from which checkpoint, and what is different from when it was stopped."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import yaml

from visattn.training.checkpoint_io import KEY, find_checkpoint, readable_checkpoint

ANEW = "or start anew from its weights: --model.weights CHECKPOINT"
ASIDE = ("ckpt_path", "config", "out", "name", "trainer.callbacks", "verbose", "weights_only")


def chosen(folder: Path, asked: str | None, command: str) -> tuple[Path | None, str]:
    """Return the checkpoint meant by ``--ckpt_path`` (or by a job that SLURM started again) and what was wrong."""
    if (
        command == "fit"
        and not asked
        and requeued()
        and any((folder / "checkpoints").glob("*.ckpt"))
    ):
        asked = "last"
    asked = asked or (None if command in ("fit", "tune") else "best")
    if asked is None or (asked == "none" and command != "fit"):
        return None, ""
    if asked in ("best", "last"):
        return readable_checkpoint(folder, asked)
    path = Path(asked)
    return (
        find_checkpoint(path, "last" if command == "fit" else "best") if path.is_dir() else path
    ), ""


def same_run(folder: Path, checkpoint: Path) -> bool:
    """Whether a checkpoint is one of the run in ``folder``, so that training goes on there."""
    own = (folder / "checkpoints").resolve()
    if checkpoint.parent.resolve() == own:
        return True
    if any(own.glob("*.ckpt")) and folder.resolve() in checkpoint.resolve().parents:
        raise ValueError(
            f"ckpt_path: {checkpoint} would move aside with the run in {folder}; put it into {own}"
        )
    return False


def requeued() -> bool:
    """Whether SLURM has started this job before."""
    return int(os.environ.get("SLURM_RESTART_COUNT") or 0) > 0


def changes(folder: Path, config: dict) -> list[str]:
    """Return a line per key that is no longer what the run's config.yaml says."""
    try:
        before = dict(_flat(yaml.safe_load((folder / "config.yaml").read_text()) or {}))
    except (
        OSError,
        yaml.YAMLError,
        AttributeError,
    ):  # a run without its config can go on all the same
        return []
    now = dict(_flat(json.loads(json.dumps(config, default=str))))
    both = sorted(key for key in before.keys() & now.keys() if not key.startswith(ASIDE))
    return [f"{key}: {before[key]} -> {now[key]}" for key in both if before[key] != now[key]]


def refuse_other_optimizer(found: dict, wanted: list[dict], name: str) -> None:
    """Raise where the state of an optimizer, in a checkpoint, is not of the weights that ``wanted`` groups hold."""
    trained = found[KEY].get("optimizer", name)
    if trained != name:
        raise ValueError(
            f"the checkpoint holds the state of optimizer {trained!r}, not {name!r}; {ANEW}"
        )
    for state in found.get("optimizer_states", ()):
        groups = state["param_groups"]
        sizes = [[len(group["params"]) for group in side] for side in (groups, wanted)]
        names = [[group.get("param_names") for group in side] for side in (groups, wanted)]
        if sizes[0] != sizes[1] or (names[0] != names[1] and None not in names[0]):
            raise ValueError(
                "the checkpoint's optimizer groups other weights: freeze, unfreeze_epoch and whether layer_decay is "
                f"below 1 must stay as they were; {ANEW}"
            )


def _flat(tree: dict, prefix: str = "") -> Iterator[tuple[str, object]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
