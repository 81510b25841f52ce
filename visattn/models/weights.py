"""Weights from a file on this machine: read whatever form they have, and give them to a network with a new head."""

from pathlib import Path

from timm.models import load_state_dict
from torch import Tensor, nn


def last_layer(model: nn.Module) -> tuple[str, nn.Module]:
    """Return the name and module of the layer that gives class scores, by timm's convention or as the last linear."""
    told = model.get_classifier() if hasattr(model, "get_classifier") else None
    linear = [
        (name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear)
    ]
    found = [(name, module) for name, module in model.named_modules() if module is told] or linear[
        -1:
    ]
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no last linear layer that could be told from its backbone"
        )
    return found[0]


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Return the state dict of a .safetensors, .pt, .pth or .bin file, or of a checkpoint of visattn's training."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"weights: there is no file {str(path)!r}")
    try:
        state = load_state_dict(str(path))
    except Exception as error:  # torch and safetensors raise a dozen types for what is damaged or no weights at all
        raise ValueError(
            f"weights: {path} is damaged or holds no weights ({type(error).__name__})"
        ) from error
    if not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"weights: {path} holds no weights")
    inner = {
        key.removeprefix("model."): value
        for key, value in state.items()
        if key.startswith("model.")
    }
    return inner or state


def load_weights(model: nn.Module, state: dict[str, Tensor], source: str | Path) -> nn.Module:
    """Load all but a head of another number of classes; what else does not fit is an error that names it."""
    name, head = last_layer(model)
    heads = {f"{name}.{key}": value.shape for key, value in head.state_dict().items()}
    kept = {
        key: value for key, value in state.items() if key not in heads or heads[key] == value.shape
    }
    try:
        found = model.load_state_dict(kept, strict=False)
    except RuntimeError as error:  # a size mismatch
        line = str(error).splitlines()[-1].strip()
        raise ValueError(
            f"weights: {source} does not fit {type(model).__name__}: {line}"
        ) from error
    missing = [key for key in found.missing_keys if key not in heads]
    if missing or found.unexpected_keys:
        first = (
            f"has no {missing[0]!r}" if missing else f"has a foreign {found.unexpected_keys[0]!r}"
        )
        counts = f"{len(missing)} missing, {len(found.unexpected_keys)} foreign"
        raise ValueError(
            f"weights: {source} does not fit {type(model).__name__}: it {first} ({counts})"
        )
    return model
