"""Layouts: which tokens of a grid meet, by folding groups of them into the batch.

All layouts have the methods of ``Layout``. Groups vary fastest in the folded batch.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from visattn.core.position.coordinates import Coordinates, grid_coordinates, rows_and_columns

Pair = tuple[int, int]


class Layout(Protocol):
    """How tokens (B, N, C) are folded into G groups of T tokens, so that only a group's meet."""

    def fold(self, x: Tensor) -> Tensor:
        """Fold queries: (B, N, C) -> (B * G, T, C)."""

    def fold_keys(self, x: Tensor) -> Tensor:
        """Fold keys, which differ from queries only where they overlap between groups."""

    def unfold(self, y: Tensor) -> Tensor:
        """Bring the outputs of queries back: (B * G, T, C) -> (B, N, C)."""

    def token_index(self, device: torch.device | None = None) -> Tensor:
        """Return which token is which query: (G, T), -1 for padding."""

    def key_index(self, device: torch.device | None = None) -> Tensor:
        """Return which token is which key: (G, Tk), -1 for padding."""

    def meets(self, device: torch.device | None = None) -> Tensor | None:
        """Return the mask (G or 1, 1, T or 1, Tk) of pairs that meet; None where all do."""

    def coordinates(self, device: torch.device | None = None) -> Coordinates:
        """Return rows and columns of queries and keys, for positions."""


@dataclass(frozen=True)
class Tiling:
    """A grid cut into tiles of at most ``size``, padded below and at the right to whole tiles."""

    grid: Pair
    size: Pair

    @property
    def extent(self) -> Pair:
        """Rows and columns of a tile, never more than the grid has."""
        return min(self.size[0], self.grid[0]), min(self.size[1], self.grid[1])

    @property
    def counts(self) -> Pair:
        """Tiles along the rows and along the columns."""
        rows, columns = self.extent
        return -(-self.grid[0] // rows), -(-self.grid[1] // columns)

    def is_exact(self) -> bool:
        """Whether nothing is padded."""
        return self.grid[0] % self.extent[0] == 0 and self.grid[1] % self.extent[1] == 0

    def pad(self, x: Tensor) -> Tensor:
        """Lay tokens (B, N, C) out as (B, rows, columns, C), with zeros up to whole tiles."""
        _check_tokens(x, self.grid)
        below = self.counts[0] * self.extent[0] - self.grid[0]
        right = self.counts[1] * self.extent[1] - self.grid[1]
        x = x.unflatten(1, self.grid)
        if below or right:
            x = F.pad(x, (0, 0, 0, right, 0, below))
        return x

    def crop(self, x: Tensor) -> Tensor:
        """Undo ``pad``: (B, rows, columns, C) -> (B, N, C)."""
        return x[:, : self.grid[0], : self.grid[1]].flatten(1, 2)


@dataclass(frozen=True)
class Windows:
    """Neighboring tokens in windows of ``size``, moved by ``shift``; a window is never larger than the grid.

    A grid that is no multiple of the size is padded below and at the right; a shift moves the
    windows around the edge, and tokens that were not neighbors before do not meet (Liu et al. 2021,
    Swin, https://arxiv.org/abs/2103.14030).

    >>> Windows((3, 4), (2, 2)).token_index()
    tensor([[ 0,  1,  4,  5],
            [ 2,  3,  6,  7],
            [ 8,  9, -1, -1],
            [10, 11, -1, -1]])
    """

    grid: Pair
    size: Pair
    shift: Pair = (0, 0)
    kind = "token"

    @property
    def tiling(self) -> Tiling:
        return Tiling(self.grid, self.size)

    @property
    def moved(self) -> Pair:
        """The shift, where there is more than one window to shift."""
        extent = self.tiling.extent
        down = self.shift[0] if extent[0] < self.grid[0] else 0
        right = self.shift[1] if extent[1] < self.grid[1] else 0
        return down, right

    def fold(self, x: Tensor) -> Tensor:
        extent = self.tiling.extent
        counts = self.tiling.counts
        x = self.tiling.pad(x)
        if any(self.moved):
            x = x.roll((-self.moved[0], -self.moved[1]), dims=(1, 2))
        # (B, rows, columns, C) -> (B, count, extent, count, extent, C)
        x = x.unflatten(2, (counts[1], extent[1])).unflatten(1, (counts[0], extent[0]))
        return x.transpose(2, 3).flatten(3, 4).flatten(0, 2)

    def unfold(self, y: Tensor) -> Tensor:
        y = y.unflatten(1, self.tiling.extent).unflatten(0, (-1, *self.tiling.counts))
        y = y.transpose(2, 3).flatten(3, 4).flatten(1, 2)  # (B, rows, columns, C)
        if any(self.moved):
            y = y.roll(self.moved, dims=(1, 2))
        return self.tiling.crop(y)

    def fold_keys(self, x: Tensor) -> Tensor:
        return self.fold(x)

    def token_index(self, device: torch.device | None = None) -> Tensor:
        return _index(self, device)

    def key_index(self, device: torch.device | None = None) -> Tensor:
        return _index(self, device)

    def meets(self, device: torch.device | None = None) -> Tensor | None:
        if not any(self.moved):
            return _hide_padding(self, device)
        # The first rows and columns come back behind the last ones: there they are strangers, as
        # padding (0) is to all. Tokens of one number meet: 1 + 1 for moved rows + 2 for columns.
        moved = torch.tensor(self.moved, device=device)
        is_moved = (rows_and_columns(self.grid, device) < moved).long()
        number = 1 + is_moved @ torch.tensor([[1], [2]], device=device)
        number = self.fold(number)[..., 0]  # (G, T)
        return number[:, None, :, None] == number[:, None, None, :]

    def coordinates(self, device: torch.device | None = None) -> Coordinates:
        return grid_coordinates(self.tiling.extent, device)


@dataclass(frozen=True)
class Grid:
    """Tokens equally far apart: each group is a coarse grid of ``size`` over the whole (MaxViT).

    Tu et al. 2022, https://arxiv.org/abs/2204.01697. A grid that is no multiple of the size is
    padded below and right.

    >>> Grid((2, 4), (2, 2)).token_index()
    tensor([[0, 2, 4, 6],
            [1, 3, 5, 7]])
    """

    grid: Pair
    size: Pair
    kind = "token"

    @property
    def tiling(self) -> Tiling:
        return Tiling(self.grid, self.size)

    def fold(self, x: Tensor) -> Tensor:
        extent = self.tiling.extent
        counts = self.tiling.counts
        x = self.tiling.pad(x)
        # (B, rows, columns, C) -> (B, extent, count, extent, count, C)
        x = x.unflatten(2, (extent[1], counts[1])).unflatten(1, (extent[0], counts[0]))
        return x.permute(0, 2, 4, 1, 3, 5).flatten(3, 4).flatten(0, 2)

    def unfold(self, y: Tensor) -> Tensor:
        y = y.unflatten(1, self.tiling.extent).unflatten(0, (-1, *self.tiling.counts))
        y = y.permute(0, 3, 1, 4, 2, 5)  # (B, extent, count, extent, count, C)
        return self.tiling.crop(y.flatten(3, 4).flatten(1, 2))

    def fold_keys(self, x: Tensor) -> Tensor:
        return self.fold(x)

    def token_index(self, device: torch.device | None = None) -> Tensor:
        return _index(self, device)

    def key_index(self, device: torch.device | None = None) -> Tensor:
        return _index(self, device)

    def meets(self, device: torch.device | None = None) -> Tensor | None:
        return _hide_padding(self, device)

    def coordinates(self, device: torch.device | None = None) -> Coordinates:
        return grid_coordinates(self.tiling.extent, device)


def strips(grid: Pair, axis: str) -> Windows:
    """Return whole rows (axis "width") or whole columns (axis "height") as windows."""
    size = (grid[0], 1) if axis == "height" else (1, grid[1])
    return Windows((grid[0], grid[1]), size)


@dataclass(frozen=True)
class CrissCross:
    """A token meets its row and its column, itself once (Huang et al. 2019, https://arxiv.org/abs/1811.11721).

    >>> CrissCross((2, 2)).meets()[0, 0, 0]
    tensor([ True,  True,  True, False])
    """

    grid: Pair
    kind = "token"

    def fold(self, x: Tensor) -> Tensor:
        _check_tokens(x, self.grid)
        return x

    def unfold(self, y: Tensor) -> Tensor:
        return y

    def fold_keys(self, x: Tensor) -> Tensor:
        return self.fold(x)

    def token_index(self, device: torch.device | None = None) -> Tensor:
        return torch.arange(self.grid[0] * self.grid[1], device=device)[None]

    def key_index(self, device: torch.device | None = None) -> Tensor:
        return self.token_index(device)

    def meets(self, device: torch.device | None = None) -> Tensor:
        yx = rows_and_columns(self.grid, device)
        return (yx[:, :, None] == yx[:, None]).any(-1)[:, None]

    def coordinates(self, device: torch.device | None = None) -> Coordinates:
        return grid_coordinates(self.grid, device)


@dataclass(frozen=True)
class Neighborhood:
    """A token meets the ``kernel_size`` tokens around it; at a border the neighborhood moves inside, as large as ever.

    Hassani et al. 2023, https://arxiv.org/abs/2204.07143. Queries are folded in tiles of
    ``kernel_size``; the keys of a tile are the union of its queries' neighborhoods, a region less
    than twice as wide, so that memory grows with the tokens and not with their square. A
    neighborhood is never larger than the grid.

    >>> Neighborhood((1, 5), (1, 3)).meets()[:, 0].long()
    tensor([[[1, 1, 1, 0, 0],
             [1, 1, 1, 0, 0],
             [0, 1, 1, 1, 0]],
    <BLANKLINE>
            [[0, 0, 1, 1, 1],
             [0, 0, 1, 1, 1],
             [0, 0, 0, 0, 0]]])
    """

    grid: Pair
    kernel_size: Pair
    kind = "token"

    @property
    def tiling(self) -> Tiling:
        """Tiles of queries, as large as the kernel."""
        return Tiling(self.grid, self.kernel_size)

    def fold(self, x: Tensor) -> Tensor:
        return Windows(self.grid, self.kernel_size).fold(x)

    def unfold(self, y: Tensor) -> Tensor:
        return Windows(self.grid, self.kernel_size).unfold(y)

    def fold_keys(self, x: Tensor) -> Tensor:
        _check_tokens(x, self.grid)
        rows = self._region(0, x.device)
        columns = self._region(1, x.device)
        x = x.unflatten(1, self.grid)
        x = x.index_select(1, rows.flatten()).index_select(2, columns.flatten())
        # (B, tiles, region rows, tiles, region columns, C) -> (B * tiles, keys, C)
        x = x.unflatten(2, columns.shape).unflatten(1, rows.shape)
        return x.transpose(2, 3).flatten(3, 4).flatten(0, 2)

    def token_index(self, device: torch.device | None = None) -> Tensor:
        return _index(self, device)

    def key_index(self, device: torch.device | None = None) -> Tensor:
        tokens = torch.arange(self.grid[0] * self.grid[1], device=device)
        return self.fold_keys(tokens[None, :, None])[..., 0]

    def meets(self, device: torch.device | None = None) -> Tensor:
        query, key, _, _ = self.coordinates(device)  # (G, T, 2), (G, Tk, 2)
        extent = torch.tensor(self.tiling.extent, device=device)
        # At a border the neighborhood moves inside, as large as ever.
        last_start = torch.tensor(self.grid, device=device) - extent
        start = torch.minimum((query - extent // 2).clamp(min=0), last_start)[:, :, None]
        is_inside = ((key[:, None] >= start) & (key[:, None] < start + extent)).all(-1)
        is_token = _index(self, device) >= 0
        return (is_inside & is_token[:, :, None])[:, None]

    def coordinates(self, device: torch.device | None = None) -> Coordinates:
        yx = rows_and_columns(self.grid, device)
        return Coordinates(self.fold(yx), self.fold_keys(yx), self.grid, self.tiling.extent)

    def _region(self, axis: int, device: torch.device | None) -> Tensor:
        """Return the rows or columns that the keys of each tile come from: (tiles, region)."""
        size = self.grid[axis]
        extent = self.tiling.extent[axis]
        width = min(2 * extent - 1, size)
        tiles = torch.arange(self.tiling.counts[axis], device=device)
        first = (tiles * extent - extent // 2).clamp(0, size - width)
        return first[:, None] + torch.arange(width, device=device)


@dataclass(frozen=True)
class Channels:
    """The channels of a head meet, each described by its values at all tokens: a transposition of (B, H, N, D).

    >>> Channels().fold(torch.rand(2, 3, 7, 5)).shape
    torch.Size([2, 3, 5, 7])
    """

    kind = "channel"

    def fold(self, x: Tensor) -> Tensor:
        return x.transpose(-2, -1)

    def unfold(self, y: Tensor) -> Tensor:
        return y.transpose(-2, -1)


def _check_tokens(x: Tensor, grid: Pair) -> None:
    if x.shape[1] != grid[0] * grid[1]:
        raise ValueError(
            f"x must have the {grid[0]} x {grid[1]} tokens of its grid and no others; got {x.shape[1]}"
        )


def _hide_padding(layout: Windows | Grid, device: torch.device | None) -> Tensor | None:
    """Return the mask that hides padding from every query; None where there is none."""
    if layout.tiling.is_exact():
        return None
    return (_index(layout, device) >= 0)[:, None, None, :]


def _index(layout: Windows | Grid | Neighborhood, device: torch.device | None = None) -> Tensor:
    """Return which token lies where, by folding token numbers from 1; padding folds to zero."""
    numbers = torch.arange(1, 1 + layout.grid[0] * layout.grid[1], device=device)
    return layout.fold(numbers[None, :, None])[..., 0] - 1
