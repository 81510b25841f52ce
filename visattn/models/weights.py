"""Weights from a local file: read the common formats, and load them into a network."""

from pathlib import Path

from timm.models import load_state_dict
from torch import Tensor, nn


def last_layer(model: nn.Module) -> tuple[str, nn.Module]:
    """Return the name and module of the layer that gives the class scores.

    That is the one ``get_classifier`` returns, as in timm, or else the last linear layer.
    """
    named = list(model.named_modules())
    get_classifier = getattr(model, "get_classifier", None)
    if get_classifier is not None:
        classifier = get_classifier()
        for name, module in named:
            if module is classifier:
                return name, module
    for name, module in reversed(named):
        if isinstance(module, nn.Linear):
            return name, module
    raise ValueError(
        f"{type(model).__name__} has no linear layer and no get_classifier, so its head is unknown"
    )


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Return the state dict of a .safetensors, .pt, .pth or .bin file, or visattn checkpoint."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"weights: there is no file {str(path)!r}")
    try:
        state = load_state_dict(str(path))
    # torch and safetensors raise a dozen types for damaged files and files of another format.
    except Exception as error:
        raise ValueError(
            f"weights: {path} is damaged or holds no weights ({type(error).__name__})"
        ) from error
    only_tensors = all(isinstance(value, Tensor) for value in state.values())
    if not state or not only_tensors:
        raise ValueError(f"weights: {path} holds no weights")
    # A checkpoint of the training holds the network as the attribute `model`.
    network = {}
    for key, value in state.items():
        if key.startswith("model."):
            network[key.removeprefix("model.")] = value
    return network or state


def load_weights(
    model: nn.Module,
    state: dict[str, Tensor],
    source: str | Path,
) -> nn.Module:
    """Load a state dict, without its head if that is for another number of classes.

    Any other difference is an error that names the first key.
    """
    name, head = last_layer(model)
    head_shapes = {}
    for key, value in head.state_dict().items():
        head_shapes[f"{name}.{key}"] = value.shape
    fitting = {}
    for key, value in state.items():
        if key not in head_shapes or head_shapes[key] == value.shape:
            fitting[key] = value
    # Not strict, as the keys of the head may be missing; the others are checked below.
    misfit = f"weights: {source} does not fit {type(model).__name__}"
    try:
        result = model.load_state_dict(fitting, strict=False)
    except RuntimeError as error:  # a size mismatch
        reason = str(error).splitlines()[-1].strip()
        raise ValueError(f"{misfit}: {reason}") from error
    missing = [key for key in result.missing_keys if key not in head_shapes]
    unexpected = result.unexpected_keys
    counts = f"{len(missing)} missing, {len(unexpected)} foreign"
    if missing:
        raise ValueError(f"{misfit}: it has no {missing[0]!r} ({counts})")
    if unexpected:
        raise ValueError(f"{misfit}: it has a foreign {unexpected[0]!r} ({counts})")
    return model
