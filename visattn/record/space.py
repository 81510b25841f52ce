"""Where tokens lie: prefix tokens first, then the patches of a grid, row by row."""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from visattn.map import Lattice
from visattn.tracing import ModuleCall

MOST_PREFIX_TOKENS = 16


class Space(NamedTuple):
    """The tokens on one side of an attention call: prefix tokens, then the patches of a grid, row by row.

    Args:
        tokens: How many tokens there are in the picture, prefix tokens included.
        prefix: Class, register and distillation tokens in front.
        grid: (h, w) of the patches, or None where the tokens lie on no grid.
        index: (G, T) token numbers of each of the G groups (windows, strips) attention ran in, -1
            for padding, or None where all tokens meet in one group.
        lattice: Where the patches lie in the image, or None where they tile it.

    Example:
        >>> Space(7, 1, (2, 3)).fold(torch.rand(5, 7)).shape
        torch.Size([5, 7])
    """

    tokens: int
    prefix: int = 0
    grid: tuple[int, int] | None = None
    index: Tensor | None = None
    lattice: Lattice | None = None

    def fold(self, row: Tensor) -> Tensor:
        """Bring (B, tokens) into groups: (B * G, T), padding as zeros."""
        if self.index is None:
            return row
        return F.pad(row, (0, 1))[:, self.index.to(row.device)].flatten(0, 1)

    def unfold(self, groups: Tensor) -> Tensor:
        """Sum (B * G, H, T) back into (B, H, tokens); what went to padding is dropped."""
        if self.index is None:
            return groups
        index = self.index.to(groups.device)
        index = torch.where(index < 0, self.tokens, index).flatten()
        rows = groups.unflatten(0, (-1, len(self.index))).transpose(1, 2).flatten(2)
        return rows.new_zeros(*rows.shape[:2], self.tokens + 1).index_add(2, index, rows)[..., :-1]

    def find(self, token: int) -> tuple[int, int]:
        """Return the group a token lies in and its place there."""
        if self.index is None:
            return 0, token
        group, place = (self.index == token).nonzero()[0].tolist()
        return group, place


def kernel_spaces(alpha: Tensor, grid: tuple[int, int], size: int) -> tuple[Tensor, Space, Space]:
    """Make every position a group of its own, whose keys are the size x size neighbors around it.

    alpha is (B, H, N, size^2), one query per position, or (B, H, N size^2, size^2), all neighbors
    as queries.

    >>> alpha, queries, keys = kernel_spaces(torch.rand(1, 2, 6, 9), (2, 3), 3)
    >>> alpha.shape, keys.index[0].tolist()
    (torch.Size([6, 2, 1, 9]), [-1, -1, -1, -1, 0, 1, -1, 3, 4])
    """
    tokens, half = math.prod(grid), size // 2
    numbers = F.pad(torch.arange(1, 1 + tokens, dtype=torch.float32).view(1, 1, *grid), (half,) * 4)
    around = F.unfold(numbers, size)[0].T.long() - 1
    alone = alpha.shape[2] == tokens
    alpha = alpha.unflatten(2, (tokens, -1)).transpose(1, 2).flatten(0, 1)
    queries = torch.arange(tokens)[:, None] if alone else around
    return alpha, Space(tokens, 0, grid, queries), Space(tokens, 0, grid, around)


def known_space(tokens: int, grids: list, prefixes: tuple) -> Space | None:
    """Find the latest grid that leaves one of the wanted numbers of prefix tokens, the first number first."""
    for prefix in prefixes:
        for grid in reversed(grids):
            if prefix is not None and math.prod(grid) == tokens - prefix:
                return Space(tokens, prefix, grid)
    return None


def nearest_space(tokens: int, grids: list) -> Space | None:
    """Find the grid that leaves the fewest prefix tokens, if they are few."""
    rest = [tokens - math.prod(grid) for grid in grids]
    few = [n for n in rest if 0 < n <= MOST_PREFIX_TOKENS]
    return known_space(tokens, grids, (min(few),)) if few else None


def space_by_aspect(
    tokens: int, image_size: tuple[int, int], prefixes: tuple = (0, 1, 2, 5)
) -> Space | None:
    """Factor the tokens into a grid of the image's aspect: for models that cut patches without a convolution."""
    height, width = image_size
    for p in prefixes:
        h = round(math.sqrt(max(tokens - p, 0) * height / width))
        if (
            h
            and (tokens - p) % h == 0
            and abs((tokens - p) // h * height - h * width) < max(height, width)
        ):
            return Space(tokens, p, (h, (tokens - p) // h))
    return None


def window_index(
    grid: tuple[int, int], window: tuple[int, int], shift: tuple[int, int], pad_first: bool
) -> Tensor:
    """Push the token numbers of a grid through padding, cyclic shift and window partition: (windows, h * w)."""
    index = torch.arange(math.prod(grid)).view(grid)
    bottom, right = (-size % step for size, step in zip(grid, window, strict=True))
    padding = (0, right, 0, bottom)
    index = F.pad(index, padding, value=-1) if pad_first else index
    index = index.roll((-shift[0], -shift[1]), (0, 1))
    index = index if pad_first else F.pad(index, padding, value=-1)
    return (
        index.unflatten(1, (-1, window[1]))
        .unflatten(0, (-1, window[0]))
        .transpose(1, 2)
        .flatten(2)
        .flatten(0, 1)
    )


def strided_index(grid: tuple[int, int], parts: tuple[int, int]) -> Tensor:
    """Push the token numbers of a grid through MaxViT's grid partition: every group spans the whole picture."""
    index = torch.arange(math.prod(grid)).view(grid)
    index = index.unflatten(1, (parts[1], -1)).unflatten(0, (parts[0], -1))
    return index.permute(1, 3, 0, 2).flatten(2).flatten(0, 1)


def grids_of(call: ModuleCall, is_outermost: bool = False) -> list[tuple[int, int]]:
    """Return the grids the inputs may lie on: (B, C, h, w), (B, h, w, C), or an argument (h, w)."""
    arguments = []
    for value in call.inputs:
        if isinstance(value, tuple) and len(value) == 2 and all(type(n) is int for n in value):
            arguments.append(value)
    x = call.input_tensor
    if x is None or x.ndim != 4:
        return arguments
    channels_first = (x.shape[2], x.shape[3])
    if is_outermost:
        return [channels_first]
    return [channels_first, (x.shape[1], x.shape[2]), *arguments]


def windowed_space(calls: list[ModuleCall], groups: int, tokens: int) -> Space | None:
    """Read the window partition off the modules that are running, innermost first; None if none states one."""
    for position, call in reversed(list(enumerate(calls))):
        for grid in grids_of(call, is_outermost=position == 0):
            index = _partition(call.module, grid)
            if index is not None and tuple(index.shape) == (groups, tokens):
                return Space(math.prod(grid), 0, grid, index)
    return None


def _partition(module, grid: tuple[int, int]) -> Tensor | None:
    if hasattr(module, "window_size") and hasattr(module, "shift_size"):
        window, shift = pair(module.window_size), pair(module.shift_size)
        # timm rolls, then pads; torchvision and transformers pad, then roll, and torchvision does
        # not roll where one window covers the whole side.
        pad_first = not type(module).__module__.startswith("timm.")
        if pad_first:
            shift = tuple(
                0 if w >= side else s for s, w, side in zip(shift, window, grid, strict=True)
            )
        return window_index(grid, window, shift, pad_first)
    if hasattr(module, "partition_size"):
        by_window, size = getattr(module, "partition_block", True), pair(module.partition_size)
    elif hasattr(module, "partition_type"):
        by_window, size = module.partition_type == "window", pair(module.p)
        size = size if by_window else (grid[0] // size[0], grid[1] // size[1])
    else:
        return None
    if any(side % step for side, step in zip(grid, size, strict=True)):
        return None
    return window_index(grid, size, (0, 0), True) if by_window else strided_index(grid, size)


def pair(value) -> tuple[int, int]:
    """Return what torch makes of one number or two."""
    return (
        (int(value), int(value))
        if not isinstance(value, (tuple, list))
        else (int(value[0]), int(value[-1]))
    )
