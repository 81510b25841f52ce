"""Load trained weights of other implementations into our blocks."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from visattn.blocks.reference.channel import CHANNEL_KEYS
from visattn.blocks.reference.spatial import SPATIAL_KEYS
from visattn.blocks.reference.token import TOKEN_KEYS

KEY_MAPS: dict[str, dict[str, Any]] = {**CHANNEL_KEYS, **SPATIAL_KEYS, **TOKEN_KEYS}
"""{class: {source: key map}}.

A key map is {their prefix: target}. A target is our prefix, or a pair (our prefix, function of
the tensor), or None for a tensor that is not loaded. In place of a key map there may be a pair
(function of the whole state dict, key map).
"""


def load_reference(
    block: nn.Module,
    state_dict: Mapping[str, Tensor],
    source: str,
) -> nn.Module:
    """Load weights of the implementation `source` ("paper", "timm", ...) and return the block.

    The keys must match one to one after renaming; shapes may differ in axes of size one only.
    """
    name = type(block).__name__
    sources = KEY_MAPS.get(name, {})
    if source not in sources:
        raise ValueError(
            f"no key map of {name} from {source!r}; known sources: {', '.join(sources) or 'none'}"
        )
    key_map = sources[source]
    if isinstance(key_map, tuple):
        prepare, key_map = key_map
        state_dict = prepare(state_dict)
    renamed = _rename_keys(state_dict, key_map)
    expected = block.state_dict()
    missing = sorted(expected.keys() - renamed.keys())
    unexpected = sorted(renamed.keys() - expected.keys())
    if missing or unexpected:
        raise ValueError(
            f"the {source} weights do not fit this {name}: missing {missing}, "
            f"unexpected {unexpected}; build the block with the options of these weights"
        )
    reshaped = {}
    for key, tensor in expected.items():
        reshaped[key] = _reshape_like(key, renamed[key], tensor)
    block.load_state_dict(reshaped)
    return block


def _rename_keys(
    state_dict: Mapping[str, Tensor],
    key_map: Mapping[str, Any],
) -> dict[str, Tensor]:
    """Apply a key map to a state dict; a key without an entry keeps its name."""
    renamed = {}
    for key, tensor in state_dict.items():
        prefix = _longest_prefix(key, key_map)
        if prefix is None:
            renamed[key] = tensor
            continue
        target = key_map[prefix]
        if target is None:
            continue
        convert: Callable[[Tensor], Tensor] | None = None
        if isinstance(target, tuple):
            target, convert = target
        renamed[target + key.removeprefix(prefix)] = convert(tensor) if convert else tensor
    return renamed


def _longest_prefix(
    key: str,
    prefixes: Mapping[str, Any],
) -> str | None:
    """Return the longest prefix, in whole words between dots, of a key."""
    matches = [prefix for prefix in prefixes if key == prefix or key.startswith(f"{prefix}.")]
    return max(matches, key=len, default=None)


def _reshape_like(key: str, tensor: Tensor, expected: Tensor) -> Tensor:
    """Reshape between forms that differ in axes of size one: a linear layer, a 1x1 convolution."""
    sizes = [size for size in tensor.shape if size != 1]
    expected_sizes = [size for size in expected.shape if size != 1]
    if sizes != expected_sizes:
        raise ValueError(
            f"{key}: expected shape {tuple(expected.shape)}, got {tuple(tensor.shape)}"
        )
    return tensor.reshape(expected.shape)
