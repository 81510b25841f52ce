"""replace: swap the attention layers a network has for another block."""

from difflib import get_close_matches

from torch import Tensor, nn

from visattn.blocks.catalog import BLOCKS
from visattn.surgery.block import one_map_block
from visattn.surgery.places import dry_run, walk

# How timm and torchvision call their layers.
OTHERS = {
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
    **options,
) -> nn.Module:
    r"""Replace every attention layer of one kind by a new block, in place, and return the network.

    Args:
        model: A network of torchvision, timm, this library or your own.
        old: A name of ``BLOCKS`` (torchvision's and timm's layers of that kind count) or a class
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
    classes = {old, *OTHERS.get(old, ())} | (
        {BLOCKS[old].block.__name__} if old in BLOCKS else set()
    )
    shapes = {
        call.name: (call.taken, call.given)
        for call in walk(dry_run(model, example))
        if type(call.module).__name__ in classes
    }
    if not shapes:
        raise ValueError(
            f"{type(model).__name__} has no layer {old!r} that runs; {_present(model, old)}"
        )
    built = {
        name: _build(new, model, name, taken, given, options)
        for name, (taken, given) in shapes.items()
    }
    for name, block in built.items():
        model.set_submodule(name, block)
    return model


def _build(
    new: str, model: nn.Module, name: str, taken: Tensor, given: Tensor, options: dict
) -> nn.Module:
    """The new block on the device and in the dtype and mode of the layer that leaves."""
    if taken is None or given is None or taken.ndim != 4 or taken.shape != given.shape:
        raise ValueError(
            f"layer {name!r} must take and give one map of the same shape (B, C, H, W) to be replaced"
        )
    old = model.get_submodule(name)
    block = one_map_block(new, taken.shape[1], options).train(old.training)
    return block.to(device=taken.device, dtype=taken.dtype)


def _present(model: nn.Module, old: str) -> str:
    """The attention layers that are there, and the nearest class names."""
    present = {type(part).__name__ for part in model.modules()}
    known = [name for name, names in OTHERS.items() if present & set(names)]
    near = get_close_matches(old, sorted(present), n=3, cutoff=0.4)
    return f"found here: {', '.join(known) or 'no known attention layer'}; near class names: {', '.join(near) or 'none'}"
