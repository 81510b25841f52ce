"""The block that insert and replace put into a network."""

import inspect

from torch import nn

from visattn.blocks.catalog import create_block


def one_map_block(name: str, channels: int, options: dict) -> nn.Module:
    """The block called `name`; refused if it takes more than one map, as a place in a network gives it one."""
    block = create_block(name, channels, **options)
    needed = [
        p for p in inspect.signature(block.forward).parameters.values() if p.default is p.empty
    ]
    if len(needed) != 1:
        raise ValueError(
            f"block {name!r} takes {len(needed)} maps and a place in a network gives one; choose another"
        )
    return block
