"""Ranges of scores that are in memory at the same time."""

from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor


class Tile(NamedTuple):
    """A range of batch entries, of heads and of query rows."""

    batch: slice
    heads: slice
    rows: slice


def tiles(
    shape: tuple[int, int, int, int],
    scores: int,
    *,
    head_local: bool = True,
) -> Iterator[Tile]:
    """Cut scores of (B, H, Nq, Nk) into tiles of about ``scores`` scores.

    A tile holds several whole images if they fit, else several whole heads, else rows of one head.

    Args:
        shape: (B, H, Nq, Nk).
        scores: How many scores a tile may hold; it has one row of each head at least.
        head_local: Whether heads may be separated.
    """
    if 0 in shape:
        return
    batch, heads, queries, _ = shape
    images, group, rows = _tile_size(shape, scores, head_local)
    for b in range(0, batch, images):
        for h in range(0, heads, group):
            for r in range(0, queries, rows):
                yield Tile(slice(b, b + images), slice(h, h + group), slice(r, r + rows))


def _tile_size(
    shape: tuple[int, int, int, int],
    scores: int,
    head_local: bool,
) -> tuple[int, int, int]:
    """Return the images, heads and rows of one tile."""
    batch, heads, queries, keys = shape
    smallest_group = 1 if head_local else heads
    rows = _at_most(queries, scores // (smallest_group * keys))
    if rows < queries:
        return 1, smallest_group, rows
    group = min(heads, max(smallest_group, scores // (rows * keys)))
    if group < heads:
        return 1, group, rows
    images = _at_most(batch, scores // (group * rows * keys))
    return images, group, rows


def _at_most(limit: int, count: int) -> int:
    """Return ``count``, at least one and at most ``limit``."""
    return min(limit, max(1, count))


def cut(x: Tensor, tile: Tile) -> Tensor:
    """Return a tile of a tensor that broadcasts to (B, H, Nq, Nk); axes of size one stay."""
    index = []
    for axis, span in enumerate(tile):
        index.append(span if x.shape[axis] > 1 else slice(None))
    return x[tuple(index)]


def cut_optional(x: Tensor | None, tile: Tile) -> Tensor | None:
    """Return a tile of a bias or mask; None stays None."""
    return None if x is None else cut(x, tile)
