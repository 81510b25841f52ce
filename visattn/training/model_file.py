"""One safetensors file that holds a whole classifier: weights, and in its header how to rebuild and use the network."""

import json
import os
from pathlib import Path

import safetensors.torch
from safetensors import SafetensorError, safe_open
from torch import nn

from visattn.training.checkpoint_io import FORMAT, KEY
from visattn.training.network import build_network

FILE = "model.safetensors"
FOREIGN = {".pt2": "torch.export.load", ".onnx": "onnxruntime.InferenceSession"}


def write_model(path: Path, model: nn.Module, note: dict) -> None:
    """Write the weights and the note of a checkpoint; the file appears only once it is whole."""
    part = path.with_name(f"{path.name}.part")
    safetensors.torch.save_model(model, str(part), metadata={KEY: json.dumps(note)})
    os.replace(part, path)


def read_model(path: Path) -> tuple[nn.Module, dict]:
    """Rebuild the network of such a file; return it with the note."""
    try:
        with safe_open(path, "pt") as content:
            text = (content.metadata() or {}).get(KEY)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is damaged or no safetensors file ({error})") from error
    if text is None:
        raise ValueError(
            f"{path} holds weights alone: it does not say how visattn rebuilds their model. For weights of timm: "
            "create_model, then load_state_dict"
        )
    note = json.loads(text)
    if note["format"] > FORMAT:
        raise ValueError(
            f"{path} has format {note['format']}, this visattn reads up to {FORMAT}: install a newer one"
        )
    model = build_network(**note["network"])
    try:
        safetensors.torch.load_model(model, str(path))
    except RuntimeError as error:
        raise ValueError(
            f"the weights in {path} do not fit the model {note['network']['name']!r}: {error}"
        ) from error
    return model, note
