"""Bring trained weights of other implementations into our blocks."""

from collections.abc import Mapping

from torch import Tensor, nn

from visattn.blocks.reference.channel import CHANNEL_KEYS
from visattn.blocks.reference.spatial import SPATIAL_KEYS
from visattn.blocks.reference.token import TOKEN_KEYS

KEY_MAPS = CHANNEL_KEYS | SPATIAL_KEYS | TOKEN_KEYS
"""{class: {source: key map}}, or in place of a key map a pair (function of the whole state dict, key map)."""


def load_reference(block: nn.Module, state_dict: Mapping[str, Tensor], source: str) -> nn.Module:
    """Load the weights `state_dict` of the implementation `source` ("paper", "timm", ...) into `block` and return it.

    Every key must find its place and every parameter its value; shapes may differ in axes of size
    one only.
    """
    name = type(block).__name__
    sources = KEY_MAPS.get(name, {})
    if source not in sources:
        raise ValueError(
            f"no key map of {name} from {source!r}; known sources: {', '.join(sources) or 'none'}"
        )
    keys = sources[source]
    prepare, keys = keys if isinstance(keys, tuple) else (dict, keys)
    renamed = _rename(prepare(state_dict), keys)
    own = block.state_dict()
    missing, extra = sorted(own.keys() - renamed.keys()), sorted(renamed.keys() - own.keys())
    if missing or extra:
        raise ValueError(
            f"the {source} weights do not fit this {name}: not given {missing}, without a place {extra}; "
            "build the block with the options that the weights were trained with"
        )
    block.load_state_dict({key: _fit(key, renamed[key], own[key]) for key in own})
    return block


def _rename(state_dict: Mapping[str, Tensor], keys: Mapping) -> dict[str, Tensor]:
    """Apply a key map: their prefix -> our prefix, (our prefix, function of the tensor), or None: left out."""
    renamed = {}
    for key, value in state_dict.items():
        prefix = max(
            (p for p in keys if key == p or key.startswith(f"{p}.")), key=len, default=None
        )
        target = (key, None) if prefix is None else keys[prefix]
        if target is None:
            continue
        place, change = target if isinstance(target, tuple) else (target, None)
        ours = key if prefix is None else place + key[len(prefix) :]
        renamed[ours] = change(value) if change else value
    return renamed


def _fit(key: str, value: Tensor, own: Tensor) -> Tensor:
    """Reshape between forms that differ in axes of size one, as a linear layer and a 1x1 convolution do."""
    if [n for n in value.shape if n != 1] != [n for n in own.shape if n != 1]:
        raise ValueError(f"{key}: expected shape {tuple(own.shape)}, got {tuple(value.shape)}")
    return value.reshape(own.shape)
