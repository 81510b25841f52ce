"""What a checkpoint must hold to be used without the code that trained it, and how it is found and read."""

from pathlib import Path

import torch
from torch import nn

from visattn.models.presets import create_model
from visattn.models.weights import load_weights, read_weights
from visattn.surgery.inserted import insert as insert_block

FORMAT = 1
KEY = "visattn"
LATEST = ("last", "previous")  # the one before the last is kept beside it


def build_network(
    name: str,
    *,
    num_classes: int,
    image_size: int | tuple[int, int],
    pretrained: bool = False,
    weights: str | None = None,
    insert: str | None = None,
    where: str = "blocks",
    options: dict | None = None,
) -> nn.Module:
    """Return the network ``name`` of ``create_model``; a block named by ``insert`` is put into it at ``where``.

    ``weights`` may be those of the plain network, or of an earlier run that had the block too.
    """
    given = {
        "num_classes": num_classes,
        "image_size": image_size,
        "pretrained": pretrained,
        **(options or {}),
    }
    if insert is None or weights is None:
        model = create_model(name, weights=weights, **given)
        return model if insert is None else insert_block(model, insert, where)
    model = create_model(name, **given)
    plain = set(model.state_dict())
    model, state = insert_block(model, insert, where), read_weights(weights)
    if (model.state_dict().keys() - plain) & state.keys():
        return load_weights(model, state, weights)
    return insert_block(create_model(name, weights=weights, **given), insert, where)


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
