"""The row-chain kernels: u A of every head, for weights u (B, Nq) of the queries.

They take two passes over queries and keys and form no N x N matrix.
"""

import triton
import triton.language as tl

from visattn.core.kernels.triton.forward import load_statistic, store_statistic
from visattn.core.kernels.triton.problem import (
    key_tile,
    load_output_grads,
    load_queries,
    load_values,
    query_scores,
    query_tile,
)
from visattn.core.kernels.triton.statistic import statistic
from visattn.core.kernels.triton.weights import exponent, weigh


@triton.jit
def row_statistic(
    problem,
    statistics,
    KERNEL: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
):
    """Write origin and shift of every row."""
    tile = query_tile(problem, ROWS, WIDTH)
    p = exponent(problem, tile.h, KERNEL)
    origin, shift = statistic(problem, tile, p, KERNEL, PRECISION, KEYS)
    store_statistic(statistics, problem, tile.b, tile.h, tile.rows, origin, shift)


@triton.jit
def chain_row(
    problem,
    u,
    grads,
    statistics,
    result,
    KERNEL: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
):
    """Write u A for one tile of keys; with ``grads``, u [A o G]+ where G = grads v^T."""
    tile = key_tile(problem, KEYS, WIDTH)
    b = tile.b
    h = tile.h
    if grads is not None:
        v = load_values(problem, b, h, tile.keys, VALUE_WIDTH)
    p = exponent(problem, h, KERNEL)
    total = tl.zeros((KEYS,), tl.float32)
    for first in range(0, problem.queries, ROWS):
        rows = first + tl.arange(0, ROWS)
        inside = rows < problem.queries
        q = load_queries(problem, b, h, rows, WIDTH)
        origin, shift = load_statistic(statistics, problem, b, h, rows)
        # e, alpha: (keys, queries)
        e = query_scores(problem, tile, q, rows, PRECISION)
        alpha, _ = weigh(e, origin[None, :], shift[None, :], p, KERNEL)
        if grads is not None:
            grad = load_output_grads(problem, grads, b, h, rows, VALUE_WIDTH)
            # G, transposed: (keys, queries)
            dalpha = tl.dot(v, tl.trans(grad), input_precision=PRECISION)
            alpha = tl.maximum(alpha * dalpha, 0.0)
        query_weight = tl.load(u + b * problem.queries + rows, mask=inside, other=0.0)
        # (keys, queries) -> one sum per key
        weighted = alpha * query_weight[None, :]
        # Queries outside of the tensor have no weight.
        total += tl.sum(tl.where(inside[None, :], weighted, 0.0), 1)
    # result: (B, H, Nk), contiguous
    index = (b * problem.heads + h) * problem.keys + tile.keys
    tl.store(result + index, total, mask=tile.keys < problem.keys)
