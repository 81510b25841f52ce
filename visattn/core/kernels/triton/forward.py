"""The forward kernels: one program per tile of queries."""

import triton
import triton.language as tl

from visattn.core.kernels.triton.problem import key_scores, load_rows, query_tile, store_rows
from visattn.core.kernels.triton.statistic import statistic, threshold_on_chip
from visattn.core.kernels.triton.weights import exponent, powers, weigh


@triton.jit
def store_statistic(statistics, problem, b, h, rows, origin, shift):
    """Write origin and shift side by side: (B, H, Nq, 2)."""
    place = statistics + ((b * problem.heads + h) * problem.queries + rows) * 2
    tl.store(place, origin, mask=rows < problem.queries)
    tl.store(place + 1, shift, mask=rows < problem.queries)


@triton.jit
def load_statistic(statistics, problem, b, h, rows):
    place = statistics + ((b * problem.heads + h) * problem.queries + rows) * 2
    inside = rows < problem.queries
    return tl.load(place, mask=inside, other=0.0), tl.load(place + 1, mask=inside, other=0.0)


@triton.jit
def attend_streamed(
    problem,
    m,
    statistics,
    KIND: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
):
    """Find the rows' statistic, then weigh and add the values as the keys stream by."""
    b, h, rows, q = query_tile(problem, ROWS, WIDTH)
    p = exponent(problem, h, KIND)
    origin, shift = statistic(problem, b, h, q, rows, p, KIND, PRECISION, WIDTH, KEYS)
    total = tl.zeros((ROWS, VALUE_WIDTH), tl.float32)
    for first in range(0, problem.keys, KEYS):
        keys = first + tl.arange(0, KEYS)
        e = key_scores(problem, b, h, q, rows, keys, PRECISION, WIDTH)
        alpha, _ = weigh(e, origin[:, None], shift[:, None], p, KIND)
        v = load_rows(problem.v, b, h, keys, problem.keys, problem.value_width, VALUE_WIDTH)
        total = tl.dot(alpha.to(v.dtype), v, total, input_precision=PRECISION)
    store_rows(m, b, h, rows, problem.queries, problem.value_width, total, VALUE_WIDTH)
    store_statistic(statistics, problem, b, h, rows, origin, shift)


@triton.jit
def attend_on_chip(
    problem,
    m,
    statistics,
    KIND: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    TILES: tl.constexpr,
):
    """Form whole rows of scores once, as TILES tiles that stay in registers; for the entmax family."""
    b, h, rows, q = query_tile(problem, ROWS, WIDTH)
    p = exponent(problem, h, KIND)
    e = ()
    for i in tl.static_range(TILES):
        e = e + (
            key_scores(problem, b, h, q, rows, i * KEYS + tl.arange(0, KEYS), PRECISION, WIDTH),
        )
    origin, shift, x = threshold_on_chip(e, p, KIND, TILES)
    total = tl.zeros((ROWS, VALUE_WIDTH), tl.float32)
    for i in tl.static_range(TILES):
        alpha, _ = powers(tl.maximum(x[i] - shift[:, None], 0.0), p, KIND)
        keys = i * KEYS + tl.arange(0, KEYS)
        v = load_rows(problem.v, b, h, keys, problem.keys, problem.value_width, VALUE_WIDTH)
        total = tl.dot(alpha.to(v.dtype), v, total, input_precision=PRECISION)
    store_rows(m, b, h, rows, problem.queries, problem.value_width, total, VALUE_WIDTH)
    store_statistic(statistics, problem, b, h, rows, origin, shift)
