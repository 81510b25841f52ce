"""The row-chain kernels: u A for a row u over the queries of every head, from two passes over queries and keys."""

import triton
import triton.language as tl

from visattn.core.kernels.triton.forward import load_statistic, store_statistic
from visattn.core.kernels.triton.problem import key_tile, load_rows, query_tile, scores
from visattn.core.kernels.triton.statistic import statistic
from visattn.core.kernels.triton.weights import exponent, weigh


@triton.jit
def row_statistic(
    problem,
    statistics,
    KIND: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
):
    """Write origin and shift of every row."""
    b, h, rows, q = query_tile(problem, ROWS, WIDTH)
    p = exponent(problem, h, KIND)
    origin, shift = statistic(problem, b, h, q, rows, p, KIND, PRECISION, WIDTH, KEYS)
    store_statistic(statistics, problem, b, h, rows, origin, shift)


@triton.jit
def chain_row(
    problem,
    u,
    grads,
    statistics,
    result,
    KIND: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
):
    """Write u A, or, where ``grads`` is given, u [A o G]+ with G = grads v^T, for one tile of keys."""
    b, h, keys, k = key_tile(problem, KEYS, WIDTH)
    if grads is not None:
        v = load_rows(problem.v, b, h, keys, problem.keys, problem.value_width, VALUE_WIDTH)
    p = exponent(problem, h, KIND)
    total = tl.zeros((KEYS,), tl.float32)
    for first in range(0, problem.queries, ROWS):
        rows = first + tl.arange(0, ROWS)
        q = load_rows(problem.q, b, h, rows, problem.queries, problem.width, WIDTH)
        origin, shift = load_statistic(statistics, problem, b, h, rows)
        e = scores(problem, b, h, k, q, rows[None, :], keys[:, None], PRECISION)
        alpha, _ = weigh(e, origin[None, :], shift[None, :], p, KIND)
        if grads is not None:
            grad = load_rows(grads, b, h, rows, problem.queries, problem.value_width, VALUE_WIDTH)
            alpha = tl.maximum(alpha * tl.dot(v, tl.trans(grad), input_precision=PRECISION), 0.0)
        share = tl.load(u + b * problem.queries + rows, mask=rows < problem.queries, other=0.0)
        total += tl.sum(tl.where(rows[None, :] < problem.queries, alpha * share[None, :], 0.0), 1)
    tl.store(
        result + (b * problem.heads + h) * problem.keys + keys, total, mask=keys < problem.keys
    )
