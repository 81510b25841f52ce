"""replace: exchange the attention layers of a network for another block."""

from typing import Any

from torch import Tensor, nn

from visattn.blocks.catalog import BLOCKS
from visattn.names import suggest
from visattn.surgery.block import create_map_block
from visattn.surgery.calls import dry_run, walk
from visattn.tracing import ModuleCall

# Class names of the same layers in timm and torchvision.
PEER_CLASSES = {
    "se": ("SEModule", "SqueezeExcite", "SqueezeExcitation"),
    "ese": ("EffectiveSEModule",),
    "eca": ("EcaModule", "CecaModule"),
    "cbam": ("CbamModule", "LightCbamModule"),
    "coord": ("CoordAttn",),
    "ge": ("GatherExcite",),
    "gc": ("GlobalContext",),
    "split": ("SplitAttn",),
    "sk": ("SelectiveKernel",),
    "non_local": ("NonLocalAttn",),
}


def replace(
    model: nn.Module,
    old: str,
    new: str,
    *,
    example: Tensor | tuple[int, ...] | None = None,
    **options: Any,
) -> nn.Module:
    r"""Replace every attention layer of one class by a new block, in place; return the network.

    Args:
        model: A network of torchvision, timm, this library or your own.
        old: A name of ``BLOCKS`` (includes the same layers of torchvision and timm) or a class
            name.
        new: A name of ``BLOCKS``.
        example: An input of the model or its shape, for the one dry run that finds the channels; 96
            x 96 by default.
        **options: The new block's.

    Raises:
        ValueError: The network has no such layer, a layer changes the shape of its map, or ``new``
            is unknown or takes more than one map.

    Example:
        >>> from torchvision.models import mobilenet_v3_small
        >>> model = replace(mobilenet_v3_small(), "se", "eca")
        >>> sum(type(part).__name__ == "EfficientChannelAttention" for part in model.modules())
        9
    """
    class_names = _class_names(old)
    calls = {}
    for call in walk(dry_run(model, example)):
        if type(call.module).__name__ in class_names:
            calls[call.name] = call
    if not calls:
        raise ValueError(
            f"{type(model).__name__} has no layer {old!r} that runs; {_hint(model, old)}"
        )
    # All are built before the first is placed: an error leaves the network as it was.
    blocks = {name: _build_for(call, new, options) for name, call in calls.items()}
    for name, block in blocks.items():
        model.set_submodule(name, block)
    return model


def _class_names(name: str) -> set[str]:
    """Return the class names of a block, here and elsewhere; any other name is a class itself."""
    names = {name, *PEER_CLASSES.get(name, ())}
    if name in BLOCKS:
        names.add(BLOCKS[name].block.__name__)
    return names


def _build_for(
    call: ModuleCall,
    name: str,
    options: dict[str, Any],
) -> nn.Module:
    """Build the block `name` with the channels, device, dtype and mode of the layer it replaces."""
    x = call.input_tensor
    y = call.output_tensor
    # The next layer expects the map of the layer that leaves, so its shape must stay.
    if x is None or y is None or x.ndim != 4 or x.shape != y.shape:
        raise ValueError(
            f"layer {call.name!r} must take and give one map of the same shape (B, C, H, W) "
            "to be replaced"
        )
    block = create_map_block(name, x.shape[1], options)
    block.train(call.module.training)
    return block.to(device=x.device, dtype=x.dtype)


def _hint(model: nn.Module, name: str) -> str:
    """Name the attention layers of the network, and the nearest class names."""
    classes = {type(module).__name__ for module in model.modules()}
    present = []
    for block, peers in PEER_CLASSES.items():
        if not classes.isdisjoint(peers):
            present.append(block)
    layers = ", ".join(present) or "none of timm or torchvision"
    return f"attention layers in it: {layers}; class: {suggest(name, sorted(classes))}"
