"""One safetensors file that holds a whole classifier: weights, and how to rebuild the network."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError, safe_open
from torch import nn

from visattn.training.checkpoint_io import KEY, refuse_newer_format
from visattn.training.network import build_network

MODEL_FILE = "model.safetensors"
FOREIGN_FORMATS = {".pt2": "torch.export.load", ".onnx": "onnxruntime.InferenceSession"}


def write_model(
    path: Path,
    model: nn.Module,
    note: dict[str, Any],
) -> None:
    """Write the weights and the note of a checkpoint; the file appears only once it is complete."""
    partial = path.with_name(f"{path.name}.part")
    safetensors.torch.save_model(model, str(partial), metadata={KEY: json.dumps(note)})
    os.replace(partial, path)


def read_model(path: Path) -> tuple[nn.Module, dict[str, Any]]:
    """Rebuild the network of such a file; return it with the note."""
    try:
        with safe_open(path, "pt") as content:
            metadata = content.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is damaged or no safetensors file ({error})") from error
    if KEY not in metadata:
        raise ValueError(
            f"{path} holds weights alone: it does not say how visattn rebuilds their model. "
            "For weights of timm: create_model, then load_state_dict"
        )
    note = json.loads(metadata[KEY])
    refuse_newer_format(path, note)
    model = build_network(**note["network"])
    load_weights_of(path, note, lambda: safetensors.torch.load_model(model, str(path)))
    return model, note


def load_weights_of(
    path: Path,
    note: dict[str, Any],
    load: Callable[[], Any],
) -> None:
    """Call ``load``; where the weights of ``path`` do not fit the network of ``note``, say so."""
    try:
        load()
    except RuntimeError as error:
        name = note["network"]["name"]
        raise ValueError(f"the weights in {path} do not fit the model {name!r}: {error}") from error
