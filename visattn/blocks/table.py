"""BLOCKS: every attention block by name."""

import inspect
from difflib import get_close_matches
from typing import NamedTuple

from torch import nn

from visattn.blocks.squeeze_excite import SqueezeExcite


class Entry(NamedTuple):
    """One row of BLOCKS; `kind` is channel, spatial, both, branch, token or context."""

    block: type[nn.Module]
    kind: str
    paper: str
    year: int


BLOCKS = {
    # Gates over channels, and over channels and positions.
    "se": Entry(SqueezeExcite, "channel", "Squeeze-and-Excitation Networks", 2018),
    # Gates over positions and over strips.
    # Branches, context and tokens.
}


def create_block(name: str, channels: int, **options) -> nn.Module:
    """Build the block called `name` for maps of `channels` channels; `options` are its constructor's."""
    if name not in BLOCKS:
        raise ValueError(f"unknown block {name!r}; {_nearest(name, BLOCKS)}")
    block = BLOCKS[name].block
    known = list(inspect.signature(block).parameters)[1:]
    for option in options:
        if option not in known:
            raise ValueError(f"block {name!r} has no option {option!r}; {_nearest(option, known)}")
    return block(channels, **options)


def _nearest(word: str, known) -> str:
    """What the reader may have meant, then all there is."""
    close = get_close_matches(word, known, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(map(repr, close))}? " if close else ""
    return f"{hint}known: {', '.join(known) or 'none'}"
