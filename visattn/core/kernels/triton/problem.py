"""What every kernel is given, and how it reads and writes: tensors with their strides, by rows and by pairs."""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor


class Rows(NamedTuple):
    """(B, H, N, D), dense in its last axis: the pointer, three strides, and how many query heads share one head."""

    pointer: Tensor
    batch: int
    head: int
    row: int
    group: int

    @staticmethod
    def of(x: Tensor, group: int = 1) -> "Rows":
        return Rows(x, *x.stride()[:3], group)


class Pairs(NamedTuple):
    """What broadcasts to (B, H, Nq, Nk): the pointer and strides; ``row`` is None where all queries share a value."""

    pointer: Tensor
    batch: int
    head: int
    row: int | None
    key: int

    @staticmethod
    def of(x: Tensor | None) -> "Pairs | None":
        if x is None:
            return None
        steps = [0 if size == 1 else step for size, step in zip(x.shape, x.stride(), strict=True)]
        return Pairs(x, steps[0], steps[1], None if x.shape[2] == 1 else steps[2], steps[3])


class Problem(NamedTuple):
    """e = scale q k^T + bias where mask allows, with the values and, for entmax, p = 1 / (alpha - 1) of every head."""

    q: Rows
    k: Rows
    v: Rows | None
    bias: Pairs | None
    mask: Pairs | None
    p: Tensor | None
    scale: float
    heads: int
    queries: int
    keys: int
    width: int
    value_width: int


@triton.jit
def locate(tiles, heads):
    """Return the image, the head and the tile of this program; the tiles of one head run side by side."""
    pair = tl.program_id(0) // tiles
    return (pair // heads).to(tl.int64), (pair % heads).to(tl.int64), tl.program_id(0) % tiles


@triton.jit
def load_rows(x, b, h, rows, count, width, WIDTH: tl.constexpr):
    """Return (rows, WIDTH), zero outside of the tensor."""
    columns = tl.arange(0, WIDTH)
    place = (
        x.pointer + b * x.batch + h // x.group * x.head + rows[:, None] * x.row + columns[None, :]
    )
    return tl.load(place, mask=(rows[:, None] < count) & (columns[None, :] < width), other=0.0)


@triton.jit
def store_rows(x, b, h, rows, count, width, value, WIDTH: tl.constexpr):
    columns = tl.arange(0, WIDTH)
    place = x.pointer + b * x.batch + h * x.head + rows[:, None] * x.row + columns[None, :]
    inside = (rows[:, None] < count) & (columns[None, :] < width)
    tl.store(place, value.to(x.pointer.dtype.element_ty), mask=inside)


@triton.jit
def query_tile(problem, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """Return this program's image and head, the rows of its tile and their queries."""
    b, h, tile = locate(tl.cdiv(problem.queries, ROWS), problem.heads)
    rows = tile * ROWS + tl.arange(0, ROWS)
    return b, h, rows, load_rows(problem.q, b, h, rows, problem.queries, problem.width, WIDTH)


@triton.jit
def key_tile(problem, KEYS: tl.constexpr, WIDTH: tl.constexpr):
    """Return this program's image and head, and the numbers of its tile's keys with the keys."""
    b, h, tile = locate(tl.cdiv(problem.keys, KEYS), problem.heads)
    keys = tile * KEYS + tl.arange(0, KEYS)
    return b, h, keys, load_rows(problem.k, b, h, keys, problem.keys, problem.width, WIDTH)


@triton.jit
def load_pairs(x, problem, b, h, rows, keys):
    """Return the values of pairs; ``rows`` and ``keys`` broadcast against each other, so that either may come first."""
    place = x.pointer + b * x.batch + h * x.head + keys * x.key
    inside = keys < problem.keys
    if x.row is not None:
        place += rows.to(tl.int64) * x.row
        inside = inside & (rows < problem.queries)
    return tl.load(place, mask=inside, other=0)


@triton.jit
def limit(problem, b, h, e, rows, keys):
    """Add the bias, and set to -inf what may not be attended."""
    inside = keys < problem.keys
    if problem.bias is not None:
        e += load_pairs(problem.bias, problem, b, h, rows, keys).to(tl.float32)
    if problem.mask is not None:
        inside = inside & (load_pairs(problem.mask, problem, b, h, rows, keys) != 0)
    return tl.where(inside, e, float("-inf"))


@triton.jit
def scores(problem, b, h, left, right, rows, keys, PRECISION: tl.constexpr):
    """Return the scores of (queries, keys), or of (keys, queries), after whichever is on the left."""
    e = tl.dot(left, tl.trans(right), input_precision=PRECISION) * problem.scale
    return limit(problem, b, h, e, rows, keys)


@triton.jit
def key_scores(problem, b, h, q, rows, keys, PRECISION: tl.constexpr, WIDTH: tl.constexpr):
    """Load keys and return the scores (queries, keys)."""
    k = load_rows(problem.k, b, h, keys, problem.keys, problem.width, WIDTH)
    return scores(problem, b, h, q, k, rows[:, None], keys[None, :], PRECISION)
