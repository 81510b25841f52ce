"""The arguments of every kernel, and how it reads and writes: by tokens and by pairs of tokens.

Names in all kernels: ``b`` and ``h`` are an image and a head, ``rows`` the numbers of a tile's
queries, ``keys`` of its keys. WIDTH and VALUE_WIDTH are the channels of keys and values as powers
of two, ROWS and KEYS the queries and keys of a tile, PRECISION how float32 is multiplied.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor


class Rows(NamedTuple):
    """(B, H, N, D), dense in its last axis: a pointer and three strides.

    ``group`` is the number of query heads that share one head.
    """

    pointer: Tensor
    batch: int
    head: int
    row: int
    group: int

    @staticmethod
    def of(x: Tensor, group: int = 1) -> "Rows":
        return Rows(x, x.stride(0), x.stride(1), x.stride(2), group)


class Pairs(NamedTuple):
    """What broadcasts to (B, H, Nq, Nk): a pointer and four strides, zero for axes of size one.

    ``row`` is None where all queries share a value.
    """

    pointer: Tensor
    batch: int
    head: int
    row: int | None
    key: int

    @staticmethod
    def of(x: Tensor) -> "Pairs":
        batch, head, row, key = (_broadcast_stride(x, axis) for axis in range(4))
        if x.shape[2] == 1:
            return Pairs(x, batch, head, None, key)
        return Pairs(x, batch, head, row, key)


def _broadcast_stride(x: Tensor, axis: int) -> int:
    return 0 if x.shape[axis] == 1 else x.stride(axis)


class Problem(NamedTuple):
    """e = scale q k^T + bias where mask allows, with the values.

    ``p`` is, for entmax, 1 / (alpha - 1) of every head.
    """

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


class QueryTile(NamedTuple):
    """A tile of queries in a kernel: image, head, numbers of the queries, q (ROWS, WIDTH)."""

    b: Any
    h: Any
    rows: Any
    q: Any


class KeyTile(NamedTuple):
    """A tile of keys in a kernel: image, head, numbers of the keys, k (KEYS, WIDTH)."""

    b: Any
    h: Any
    keys: Any
    k: Any


@triton.jit
def locate(tiles, heads):
    """Return the image, the head and the tile of this program.

    The tiles of one head run side by side.
    """
    # program = (image * heads + head) * tiles + tile
    pair = tl.program_id(0) // tiles
    # int64: an offset of a large batch exceeds 32 bits
    b = (pair // heads).to(tl.int64)
    h = (pair % heads).to(tl.int64)
    return b, h, tl.program_id(0) % tiles


@triton.jit
def row_index(problem, b, h, rows):
    """Return where queries are in a contiguous (B, H, Nq)."""
    return (b * problem.heads + h) * problem.queries + rows


@triton.jit
def load_rows(
    x,
    b,
    h,
    rows,
    count,
    width,
    WIDTH: tl.constexpr,
):
    """Return (rows, WIDTH), zero outside of the tensor."""
    rows = rows[:, None]
    columns = tl.arange(0, WIDTH)[None, :]
    # Query heads of a group read the same head.
    head_start = x.pointer + b * x.batch + h // x.group * x.head
    inside = (rows < count) & (columns < width)
    return tl.load(head_start + rows * x.row + columns, mask=inside, other=0.0)


@triton.jit
def store_rows(
    x,
    b,
    h,
    rows,
    count,
    width,
    value,
    WIDTH: tl.constexpr,
):
    """Write (rows, WIDTH) in the tensor's dtype, and nothing outside of the tensor."""
    rows = rows[:, None]
    columns = tl.arange(0, WIDTH)[None, :]
    head_start = x.pointer + b * x.batch + h * x.head
    inside = (rows < count) & (columns < width)
    value = value.to(x.pointer.dtype.element_ty)
    tl.store(head_start + rows * x.row + columns, value, mask=inside)


@triton.jit
def query_tile(problem, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """Return this program's tile of queries."""
    b, h, tile = locate(tl.cdiv(problem.queries, ROWS), problem.heads)
    rows = tile * ROWS + tl.arange(0, ROWS)
    q = load_queries(problem, b, h, rows, WIDTH)
    return QueryTile(b, h, rows, q)


@triton.jit
def key_tile(problem, KEYS: tl.constexpr, WIDTH: tl.constexpr):
    """Return this program's tile of keys."""
    b, h, tile = locate(tl.cdiv(problem.keys, KEYS), problem.heads)
    keys = tile * KEYS + tl.arange(0, KEYS)
    k = load_keys(problem, b, h, keys, WIDTH)
    return KeyTile(b, h, keys, k)


@triton.jit
def load_queries(problem, b, h, rows, WIDTH: tl.constexpr):
    return load_rows(problem.q, b, h, rows, problem.queries, problem.width, WIDTH)


@triton.jit
def load_keys(problem, b, h, keys, WIDTH: tl.constexpr):
    return load_rows(problem.k, b, h, keys, problem.keys, problem.width, WIDTH)


@triton.jit
def load_values(problem, b, h, keys, VALUE_WIDTH: tl.constexpr):
    return load_rows(problem.v, b, h, keys, problem.keys, problem.value_width, VALUE_WIDTH)


@triton.jit
def load_output_grads(problem, grads, b, h, rows, VALUE_WIDTH: tl.constexpr):
    """Return the gradients of the queries' outputs, (rows, VALUE_WIDTH)."""
    return load_rows(grads, b, h, rows, problem.queries, problem.value_width, VALUE_WIDTH)


@triton.jit
def load_pairs(x, problem, b, h, rows, keys):
    """Return the values of pairs.

    ``rows`` and ``keys`` broadcast against each other, so that either may be the first axis.
    """
    pointers = x.pointer + b * x.batch + h * x.head + keys * x.key
    inside = keys < problem.keys
    if x.row is not None:
        # int64: N x N values of one head may exceed 32 bits
        pointers += rows.to(tl.int64) * x.row
        inside = inside & (rows < problem.queries)
    return tl.load(pointers, mask=inside, other=0)


@triton.jit
def limit(problem, b, h, e, rows, keys):
    """Add the bias, and set to -inf what may not be attended."""
    inside = keys < problem.keys
    if problem.bias is not None:
        bias = load_pairs(problem.bias, problem, b, h, rows, keys)
        e += bias.to(tl.float32)
    if problem.mask is not None:
        allowed = load_pairs(problem.mask, problem, b, h, rows, keys)
        inside = inside & (allowed != 0)
    return tl.where(inside, e, float("-inf"))


@triton.jit
def scores(
    problem,
    b,
    h,
    left,
    right,
    rows,
    keys,
    PRECISION: tl.constexpr,
):
    """Return the scores, (queries, keys) or (keys, queries): ``left`` gives the first axis."""
    # Products accumulate in float32, whatever the dtype of the tokens.
    products = tl.dot(left, tl.trans(right), input_precision=PRECISION)
    e = products * problem.scale
    return limit(problem, b, h, e, rows, keys)


@triton.jit
def key_scores(problem, tile, keys, PRECISION: tl.constexpr):
    """Load keys and return their scores for a tile of queries, (queries, keys)."""
    k = load_keys(problem, tile.b, tile.h, keys, tile.q.shape[1])
    rows = tile.rows[:, None]
    keys = keys[None, :]
    return scores(problem, tile.b, tile.h, tile.q, k, rows, keys, PRECISION)


@triton.jit
def query_scores(problem, tile, q, rows, PRECISION: tl.constexpr):
    """Return the scores of queries for a tile of keys, (keys, queries)."""
    rows = rows[None, :]
    keys = tile.keys[:, None]
    return scores(problem, tile.b, tile.h, tile.k, q, rows, keys, PRECISION)
