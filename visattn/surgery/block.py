"""The block that insert and replace put into a network."""

import inspect
from typing import Any

from torch import nn

from visattn.blocks.catalog import create_block


def create_map_block(
    name: str,
    channels: int,
    options: dict[str, Any],
) -> nn.Module:
    """Build the block `name`; refuse one that takes more than one map, as a site has only one."""
    block = create_block(name, channels, **options)
    parameters = inspect.signature(block.forward).parameters.values()
    num_inputs = sum(parameter.default is parameter.empty for parameter in parameters)
    if num_inputs != 1:
        raise ValueError(
            f"block {name!r} takes {num_inputs} maps, but a site in a network gives one; "
            "choose another block"
        )
    return block
