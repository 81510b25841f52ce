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
    shape: tuple[int, int, int, int], scores: int, *, head_local: bool = True
) -> Iterator[Tile]:
    """Cut scores of (B, H, Nq, Nk) into tiles of about ``scores`` scores: whole images, else whole heads, else rows.

    Heads stay together where they are not ``head_local``.
    """
    batch, heads, queries, keys = shape
    if 0 in shape:
        return
    least = 1 if head_local else heads
    rows = min(queries, max(1, scores // (least * keys)))
    group = min(heads, max(least, scores // (rows * keys))) if rows == queries else least
    images = (
        min(batch, max(1, scores // (group * rows * keys)))
        if rows == queries and group == heads
        else 1
    )
    for b in range(0, batch, images):
        for h in range(0, heads, group):
            for r in range(0, queries, rows):
                yield Tile(slice(b, b + images), slice(h, h + group), slice(r, r + rows))


def part(x: Tensor, tile: Tile) -> Tensor:
    """Cut a tensor that broadcasts to (B, H, Nq, Nk), leaving axes of size one."""
    return x[tuple(cut if x.shape[axis] > 1 else slice(None) for axis, cut in enumerate(tile))]
