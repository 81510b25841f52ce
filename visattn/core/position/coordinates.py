"""Where queries and keys lie on the grid."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class Coordinates(NamedTuple):
    """Rows and columns of queries and keys, for one or more groups of tokens.

    ``queries`` and ``keys`` are integers (G, N, 2), not below zero; G is 1 where all groups are
    alike. ``extent`` bounds the rows and columns; tokens that may meet lie less than ``reach`` rows
    and columns apart. Tokens in front of these (class, registers) have no coordinates.
    """

    queries: Tensor
    keys: Tensor
    extent: tuple[int, int]
    reach: tuple[int, int]


def grid_coordinates(
    grid: tuple[int, int] | None, device: torch.device | None = None
) -> Coordinates:
    """Return the coordinates of a whole grid's tokens, row by row."""
    if grid is None:
        raise ValueError(
            "grid must be given, as (rows, columns) of the tokens, where positions or layouts are "
            "used"
        )
    yx = rows_and_columns(grid, device)
    extent = (grid[0], grid[1])
    return Coordinates(yx, yx, extent, extent)


def rows_and_columns(grid: tuple[int, int], device: torch.device | None = None) -> Tensor:
    """Return row and column of each token: (1, rows * columns, 2)."""
    rows = torch.arange(grid[0], device=device)
    columns = torch.arange(grid[1], device=device)
    pairs = torch.stack(torch.meshgrid(rows, columns, indexing="ij"), dim=-1)
    return pairs.flatten(0, 1)[None]


def repeat_for_batch(x: Tensor, batch: int) -> Tensor:
    """Repeat what each group has, (G, ...), for a batch of images with G groups each."""
    if len(x) == 1:
        return x
    return x.repeat(batch // len(x), *(1,) * (x.ndim - 1))


def pad_prefix(bias: Tensor, queries: int, keys: int) -> Tensor:
    """Put zeros in front of a bias (..., n, m), for the tokens without coordinates."""
    return F.pad(bias, (keys - bias.shape[-1], 0, queries - bias.shape[-2], 0))
