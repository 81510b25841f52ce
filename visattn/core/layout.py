"""Layouts: which tokens of a grid meet, by folding groups of them into the batch. All speak the same few words.

``fold`` takes (B, N, C) to (B * G, T, C), groups varying fastest, ``unfold`` brings the outputs of
queries back; ``fold_keys`` differs from ``fold`` only where keys overlap between groups.
``token_index()`` and ``key_index()`` say which token lies where, (G, T), -1 for padding.
``meets()`` is a mask (G, 1, T or 1, Tk), None where all of them meet. ``places()`` gives rows and
columns for positions.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from visattn.core.position.places import Places, coordinates, grid_places

Pair = tuple[int, int]


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
    def extent(self) -> Pair:
        return tuple(min(s, n) for s, n in zip(self.size, self.grid, strict=True))

    @property
    def counts(self) -> Pair:
        return tuple(-(-n // s) for s, n in zip(self.extent, self.grid, strict=True))

    @property
    def moved(self) -> Pair:
        """The shift, where there is more than one window to shift."""
        return tuple(
            m if s < n else 0 for m, s, n in zip(self.shift, self.extent, self.grid, strict=True)
        )

    def fold(self, x: Tensor) -> Tensor:
        x = _pad(x, self.grid, self.extent, self.counts)
        if any(self.moved):
            x = x.roll((-self.moved[0], -self.moved[1]), dims=(1, 2))
        x = x.unflatten(2, (self.counts[1], self.extent[1])).unflatten(
            1, (self.counts[0], self.extent[0])
        )
        return x.transpose(2, 3).flatten(3, 4).flatten(0, 2)

    def unfold(self, y: Tensor) -> Tensor:
        y = y.unflatten(1, self.extent).unflatten(0, (-1, *self.counts)).transpose(2, 3)
        y = y.flatten(3, 4).flatten(1, 2)
        return _crop(y.roll(self.moved, dims=(1, 2)) if any(self.moved) else y, self.grid)

    def fold_keys(self, x: Tensor) -> Tensor:
        return self.fold(x)

    def token_index(self, device: torch.device | None = None) -> Tensor:
        return _index(self, device)

    def key_index(self, device: torch.device | None = None) -> Tensor:
        return _index(self, device)

    def meets(self, device: torch.device | None = None) -> Tensor | None:
        if not any(self.moved):
            return _real_keys(self, device)
        # The first rows and columns come back behind the last ones: there they are strangers, as
        # padding (0) is to all.
        strangers = (
            coordinates(self.grid, device) < torch.tensor(self.moved, device=device)
        ).long()
        side = self.fold(1 + strangers @ torch.tensor([[1], [2]], device=device))[..., 0]
        return side[:, None, :, None] == side[:, None, None, :]

    def places(self, device: torch.device | None = None) -> Places:
        return grid_places(self.extent, device)


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
    def extent(self) -> Pair:
        return tuple(min(s, n) for s, n in zip(self.size, self.grid, strict=True))

    @property
    def counts(self) -> Pair:
        return tuple(-(-n // s) for s, n in zip(self.extent, self.grid, strict=True))

    def fold(self, x: Tensor) -> Tensor:
        x = _pad(x, self.grid, self.extent, self.counts)
        x = x.unflatten(2, (self.extent[1], self.counts[1])).unflatten(
            1, (self.extent[0], self.counts[0])
        )
        return x.permute(0, 2, 4, 1, 3, 5).flatten(3, 4).flatten(0, 2)

    def unfold(self, y: Tensor) -> Tensor:
        y = y.unflatten(1, self.extent).unflatten(0, (-1, *self.counts)).permute(0, 3, 1, 4, 2, 5)
        return _crop(y.flatten(3, 4).flatten(1, 2), self.grid)

    def fold_keys(self, x: Tensor) -> Tensor:
        return self.fold(x)

    def token_index(self, device: torch.device | None = None) -> Tensor:
        return _index(self, device)

    def key_index(self, device: torch.device | None = None) -> Tensor:
        return _index(self, device)

    def meets(self, device: torch.device | None = None) -> Tensor | None:
        return _real_keys(self, device)

    def places(self, device: torch.device | None = None) -> Places:
        return grid_places(self.extent, device)


def strips(grid: Pair, axis: str) -> Windows:
    """Return whole rows (axis "width") or whole columns (axis "height") as windows."""
    return Windows(tuple(grid), (grid[0], 1) if axis == "height" else (1, grid[1]))


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
        yx = coordinates(self.grid, device)
        return (yx[:, :, None] == yx[:, None]).any(-1)[:, None]

    def places(self, device: torch.device | None = None) -> Places:
        return grid_places(self.grid, device)


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
    def extent(self) -> Pair:
        """The kernel, where the grid has room for it: also the tile of queries."""
        return tuple(min(k, n) for k, n in zip(self.kernel_size, self.grid, strict=True))

    @property
    def counts(self) -> Pair:
        return tuple(-(-n // k) for k, n in zip(self.extent, self.grid, strict=True))

    def fold(self, x: Tensor) -> Tensor:
        return Windows(self.grid, self.extent).fold(x)

    def unfold(self, y: Tensor) -> Tensor:
        return Windows(self.grid, self.extent).unfold(y)

    def fold_keys(self, x: Tensor) -> Tensor:
        _check_tokens(x, self.grid)
        (rows, columns), x = self._regions(x.device), x.unflatten(1, self.grid)
        x = x.index_select(1, rows.flatten()).index_select(2, columns.flatten())
        x = x.unflatten(2, columns.shape).unflatten(1, rows.shape)
        return x.transpose(2, 3).flatten(3, 4).flatten(0, 2)

    def token_index(self, device: torch.device | None = None) -> Tensor:
        return _index(self, device)

    def key_index(self, device: torch.device | None = None) -> Tensor:
        return self.fold_keys(
            torch.arange(self.grid[0] * self.grid[1], device=device)[None, :, None]
        )[..., 0]

    def meets(self, device: torch.device | None = None) -> Tensor:
        query, key, _, _ = self.places(device)
        limits = torch.tensor(
            [n - k for n, k in zip(self.grid, self.extent, strict=True)], device=device
        )
        half = torch.tensor([k // 2 for k in self.extent], device=device)
        size = torch.tensor(self.extent, device=device)
        start = torch.minimum((query - half).clamp(min=0), limits)[:, :, None]
        inside = ((key[:, None] >= start) & (key[:, None] < start + size)).all(-1)
        return (inside & (_index(self, device) >= 0)[:, :, None])[:, None]

    def places(self, device: torch.device | None = None) -> Places:
        yx = coordinates(self.grid, device)
        return Places(self.fold(yx), self.fold_keys(yx), self.grid, self.extent)

    def _regions(self, device: torch.device | None) -> tuple[Tensor, Tensor]:
        """Return the rows (tiles, r) and the columns (tiles, c) that the keys of each tile come from."""
        regions = []
        for n, k, count in zip(self.grid, self.extent, self.counts, strict=True):
            width = min(2 * k - 1, n)
            first = (torch.arange(count, device=device) * k - k // 2).clamp(0, n - width)
            regions.append(first[:, None] + torch.arange(width, device=device))
        return regions[0], regions[1]


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


def _pad(x: Tensor, grid: Pair, extent: Pair, counts: Pair) -> Tensor:
    """Lay tokens (B, N, C) out as (B, rows, columns, C), with zeros below and right up to whole groups."""
    _check_tokens(x, grid)
    below, right = (c * s - n for c, s, n in zip(counts, extent, grid, strict=True))
    x = x.unflatten(1, grid)
    return F.pad(x, (0, 0, 0, right, 0, below)) if below or right else x


def _crop(x: Tensor, grid: Pair) -> Tensor:
    """Undo _pad."""
    return x[:, : grid[0], : grid[1]].flatten(1, 2)


def _real_keys(layout: Windows | Grid, device: torch.device | None) -> Tensor | None:
    """Return the mask that hides padding from every query; None where there is none."""
    if all(n % s == 0 for n, s in zip(layout.grid, layout.extent, strict=True)):
        return None
    return (_index(layout, device) >= 0)[:, None, None, :]


def _index(layout, device: torch.device | None = None) -> Tensor:
    """Return which token lies where, by folding the numbers of the tokens; padding folds to zero."""
    numbers = torch.arange(1, 1 + layout.grid[0] * layout.grid[1], device=device)
    return layout.fold(numbers[None, :, None])[..., 0] - 1
