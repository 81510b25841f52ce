"""MODELS, the networks by name, and create_model, which also builds timm's models.

Our ViTs are registered with timm as ``visattn_NAME``.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import timm
from timm.models import register_model
from torch import nn

from visattn.models.build import build_vit, known_options
from visattn.models.cnn import CNNS, build_resnet
from visattn.models.glimpse import build_glimpse
from visattn.models.weights import load_weights, read_weights
from visattn.names import NamedTable, lookup


class ModelEntry(NamedTuple):
    """One row of MODELS: the function that builds the model, and its default options."""

    build: Callable[..., nn.Module]
    options: dict[str, Any]


_TINY = {"dim": 192, "num_heads": 3}
_SMALL = {"dim": 384, "num_heads": 6}
_BASE = {"dim": 768, "num_heads": 12}
_LARGE = {"dim": 1024, "depth": 24, "num_heads": 16}
_DEIT3 = {"class_position": False, "layer_scale": 1e-6}
_DINOV2 = {"patch_size": 14, "image_size": 518, "class_position": False, "layer_scale": 1e-5}
_REG4 = {**_DINOV2, "num_registers": 4}
_CONV = {"stem": "conv", "patch_size": 8, "depth": 6, "mlp_ratio": 2.0}

_ENTRIES = {
    # Small images, 32 to 96 pixels.
    "vit_nano": ModelEntry(build_vit, {**_CONV, "dim": 128, "num_heads": 4, "image_size": 48}),
    "vit_micro": ModelEntry(build_vit, {**_CONV, "dim": 192, "num_heads": 6, "image_size": 64}),
    # The sizes of the papers.
    "vit_tiny_patch16": ModelEntry(build_vit, _TINY),
    "vit_small_patch16": ModelEntry(build_vit, _SMALL),
    "vit_base_patch16": ModelEntry(build_vit, _BASE),
    "vit_large_patch16": ModelEntry(build_vit, _LARGE),
    "vit_small_patch8": ModelEntry(build_vit, {**_SMALL, "patch_size": 8}),
    "vit_base_patch8": ModelEntry(build_vit, {**_BASE, "patch_size": 8}),
    "vit_small_patch32": ModelEntry(build_vit, {**_SMALL, "patch_size": 32}),
    "vit_base_patch32": ModelEntry(build_vit, {**_BASE, "patch_size": 32}),
    "deit3_small_patch16": ModelEntry(build_vit, {**_SMALL, **_DEIT3}),
    "deit3_base_patch16": ModelEntry(build_vit, {**_BASE, **_DEIT3}),
    "deit3_large_patch16": ModelEntry(build_vit, {**_LARGE, **_DEIT3}),
    "vit_small_patch14_dinov2": ModelEntry(
        build_vit, {**_SMALL, **_DINOV2, "class_position": True}
    ),
    "vit_base_patch14_dinov2": ModelEntry(build_vit, {**_BASE, **_DINOV2, "class_position": True}),
    "vit_small_patch14_reg4_dinov2": ModelEntry(build_vit, {**_SMALL, **_REG4}),
    "vit_base_patch14_reg4_dinov2": ModelEntry(build_vit, {**_BASE, **_REG4}),
    "vit_large_patch14_reg4_dinov2": ModelEntry(build_vit, {**_LARGE, **_REG4}),
    # Hosts for blocks: `block="cbam"`.
    **{name: ModelEntry(build_resnet, {"config": config}) for name, config in CNNS.items()},
    # Recurrent, one map per glimpse.
    "glimpse": ModelEntry(build_glimpse, {}),
}


def _describe_options(entry: ModelEntry) -> str:
    """Write the default options of a model as `name=value` pairs."""
    options = entry.options
    config = options.get("config")
    if config is not None:
        options = vars(config)
    words = [f"{name}={value}" for name, value in options.items()]
    # Without the spaces in tuples, so that a space separates the options.
    return " ".join(word.replace(" ", "") for word in words)


MODELS = NamedTable(
    _ENTRIES,
    columns={
        "built by": lambda entry: entry.build.__name__,
        "default options": _describe_options,
    },
)


def create_model(
    name: str,
    *,
    num_classes: int | None = None,
    image_size: int | tuple[int, int] | None = None,
    weights: str | Path | None = None,
    **options: Any,
) -> nn.Module:
    """Build the model `name` of MODELS, or timm's model NAME as `timm:NAME`.

    ``weights`` is a file (safetensors, a state dict, or a checkpoint of visattn); its head is not
    loaded if it is for another number of classes. ``pretrained=True`` downloads weights and is
    for timm's models only. An option that is None keeps the model's default.
    """
    if num_classes is not None:
        options["num_classes"] = num_classes
    if image_size is not None:
        options["image_size"] = image_size
    if name.startswith("timm:"):
        return _create_timm(name.removeprefix("timm:"), weights=weights, **options)
    entry = lookup(MODELS, name, "model")
    if options.pop("pretrained", False):
        raise ValueError(
            f"there are no pretrained weights for {name!r}; pass a file as weights=, "
            "or choose a model of timm"
        )
    option_names = dict.fromkeys(known_options(entry.build))
    for option in options:
        lookup(option_names, option, f"{name} option")
    model = entry.build(**{**entry.options, **options})
    if weights is None:
        return model
    return load_weights(model, read_weights(weights), weights)


def _create_timm(
    name: str,
    *,
    pretrained: bool = False,
    weights: str | Path | None = None,
    image_size: int | tuple[int, int] | None = None,
    in_channels: int | None = None,
    **options: Any,
) -> nn.Module:
    """Build a model of timm; only architectures of one fixed size are told the image size."""
    if not timm.is_model(name):
        lookup(dict.fromkeys(timm.list_models()), name, "timm model")
    config = timm.models.get_pretrained_cfg(name)
    if image_size is not None and config is not None and config.fixed_input_size:
        options["img_size"] = image_size
    if in_channels is not None:
        options["in_chans"] = in_channels
    if weights is not None:
        # Passed as if downloaded, so that timm converts head, positions and input channels.
        options["pretrained_cfg_overlay"] = {"state_dict": read_weights(weights)}
    loads_weights = pretrained or weights is not None
    try:
        return timm.create_model(name, pretrained=loads_weights, **options)
    except Exception as error:
        message = _explain_timm_error(error, name, pretrained, weights)
        if message is None:
            raise
        raise ValueError(message) from error


def _explain_timm_error(
    error: Exception,
    name: str,
    pretrained: bool,
    weights: str | Path | None,
) -> str | None:
    """Say in our terms why timm did not build a model, or None for its own message."""
    if isinstance(error, TypeError) and "unexpected keyword" in str(error):
        return f"timm:{name} has no such option: {error}"
    if weights is not None:
        return f"weights: {weights} does not fit timm:{name} ({_shorten(error)})"
    if pretrained and not isinstance(error, TypeError | AssertionError):
        return (
            f"timm:{name}: no pretrained weights available ({_shorten(error)}); without network, "
            "or for a model that has none, pass a file as weights="
        )
    return None


def _shorten(error: Exception) -> str:
    """Return the type of an error and its first informative line: torch and the hub fill pages."""
    stripped = [line.strip() for line in str(error).splitlines()]
    lines = [line for line in stripped if line] or [""]
    line = lines[0]
    if line.endswith(":") and len(lines) > 1:
        line = lines[1]  # the first line is only a heading
    return f"{type(error).__name__}: {line}"[:200]


# timm's name of an option -> ours
_FROM_TIMM = {
    "num_classes": "num_classes",
    "img_size": "image_size",
    "in_chans": "in_channels",
    "drop_rate": "dropout",
    "drop_path_rate": "drop_path",
    "global_pool": "pool",
}
_POOLS = {"token": "class", "avg": "mean", "map": "attention"}


def _timm_entry(name: str) -> Callable[..., nn.Module]:
    """Return the function that timm calls to build the model `name`, with timm's options."""

    def build(
        pretrained: bool = False,
        **timm_options: Any,
    ) -> nn.Module:
        for unused in ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir"):
            timm_options.pop(unused, None)
        options = {}
        for name_in_timm, value in timm_options.items():
            options[_FROM_TIMM.get(name_in_timm, name_in_timm)] = value
        if "pool" in options:
            options["pool"] = _POOLS.get(options["pool"], options["pool"])
        return create_model(name, pretrained=pretrained, **options)

    build.__name__ = f"visattn_{name}"
    build.__qualname__ = build.__name__
    return build


__all__ = ["MODELS", "ModelEntry", "create_model"]
for _name, _entry in MODELS.items():
    if _entry.build is build_vit:
        globals()[f"visattn_{_name}"] = register_model(_timm_entry(_name))
