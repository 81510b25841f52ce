"""Where queries and keys lie on the grid."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class Places(NamedTuple):
    """Rows and columns of queries and keys, for one or more groups of tokens.

    ``queries`` and ``keys`` are integers (G, N, 2), not below zero; G is 1 where all groups look
    alike. ``extent`` bounds the rows and columns; tokens that may meet lie less than ``reach`` rows
    and columns apart. Tokens in front of the placed ones (class, registers) have no place.
    """

    queries: Tensor
    keys: Tensor
    extent: tuple[int, int]
    reach: tuple[int, int]


def grid_places(grid: tuple[int, int] | None, device: torch.device | None = None) -> Places:
    """Return the places of a whole grid's tokens, row by row."""
    if grid is None:
        raise ValueError(
            "grid must be given, as (rows, columns) of the tokens, where positions or layouts are used"
        )
    yx = coordinates(grid, device)
    return Places(yx, yx, tuple(grid), tuple(grid))


def coordinates(grid: tuple[int, int], device: torch.device | None = None) -> Tensor:
    """Return (1, rows * columns, 2): row and column of each token."""
    rows, columns = (torch.arange(n, device=device) for n in grid)
    return torch.stack(torch.meshgrid(rows, columns, indexing="ij"), dim=-1).flatten(0, 1)[None]


def for_batch(x: Tensor, batch: int) -> Tensor:
    """Repeat what is given once per group (G, ...) for a batch of images of G groups each."""
    return x if len(x) == 1 else x.repeat(batch // len(x), *(1,) * (x.ndim - 1))


def behind_prefix(bias: Tensor, queries: int, keys: int) -> Tensor:
    """Put zeros in front of a bias (..., n, m), for the tokens without a place."""
    return F.pad(bias, (keys - bias.shape[-1], 0, queries - bias.shape[-2], 0))
