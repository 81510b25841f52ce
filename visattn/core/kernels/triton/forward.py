"""The forward kernels: one program per tile of queries."""

import triton
import triton.language as tl

from visattn.core.kernels.triton.problem import (
    key_scores,
    load_values,
    query_tile,
    row_index,
    store_rows,
)
from visattn.core.kernels.triton.statistic import statistic, threshold_on_chip
from visattn.core.kernels.triton.weights import exponent, powers, weigh


@triton.jit
def store_statistic(statistics, problem, b, h, rows, origin, shift):
    """Write origin and shift side by side: (B, H, Nq, 2)."""
    pointers = statistics + row_index(problem, b, h, rows) * 2
    tl.store(pointers, origin, mask=rows < problem.queries)
    tl.store(pointers + 1, shift, mask=rows < problem.queries)


@triton.jit
def load_statistic(statistics, problem, b, h, rows):
    """Return origin and shift of queries."""
    pointers = statistics + row_index(problem, b, h, rows) * 2
    inside = rows < problem.queries
    origin = tl.load(pointers, mask=inside, other=0.0)
    shift = tl.load(pointers + 1, mask=inside, other=0.0)
    return origin, shift


@triton.jit
def store_output(m, statistics, problem, tile, output, origin, shift):
    """Write the outputs of a tile of queries, (ROWS, VALUE_WIDTH), and their two numbers."""
    store_rows(
        m,
        tile.b,
        tile.h,
        tile.rows,
        problem.queries,
        problem.value_width,
        output,
        output.shape[1],
    )
    store_statistic(statistics, problem, tile.b, tile.h, tile.rows, origin, shift)


@triton.jit
def attend_streamed(
    problem,
    m,
    statistics,
    KERNEL: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
):
    """Compute the rows' statistic, then weigh and add the values tile by tile of keys."""
    tile = query_tile(problem, ROWS, WIDTH)
    p = exponent(problem, tile.h, KERNEL)
    origin, shift = statistic(problem, tile, p, KERNEL, PRECISION, KEYS)
    output = tl.zeros((ROWS, VALUE_WIDTH), tl.float32)
    for first in range(0, problem.keys, KEYS):
        keys = first + tl.arange(0, KEYS)
        # e, alpha: (queries, keys)
        e = key_scores(problem, tile, keys, PRECISION)
        alpha, _ = weigh(e, origin[:, None], shift[:, None], p, KERNEL)
        v = load_values(problem, tile.b, tile.h, keys, VALUE_WIDTH)
        # (queries, keys) x (keys, VALUE_WIDTH), added to the output in float32
        output = tl.dot(alpha.to(v.dtype), v, output, input_precision=PRECISION)
    store_output(m, statistics, problem, tile, output, origin, shift)


@triton.jit
def attend_on_chip(
    problem,
    m,
    statistics,
    KERNEL: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    TILES: tl.constexpr,
):
    """Compute whole rows of scores once, as TILES tiles in registers; for the entmax family."""
    tile = query_tile(problem, ROWS, WIDTH)
    p = exponent(problem, tile.h, KERNEL)
    e = ()
    for i in tl.static_range(TILES):
        keys = i * KEYS + tl.arange(0, KEYS)
        tile_e = key_scores(problem, tile, keys, PRECISION)
        # The compiler knows neither a star nor an annotation of the empty tuple.
        e = e + (tile_e,)  # type: ignore[assignment]  # noqa: RUF005
    origin, shift, x = threshold_on_chip(e, p, KERNEL, TILES)
    output = tl.zeros((ROWS, VALUE_WIDTH), tl.float32)
    for i in tl.static_range(TILES):
        # The scores are still in registers: no second product of queries and keys.
        r = tl.maximum(x[i] - shift[:, None], 0.0)
        alpha, _ = powers(r, p, KERNEL)
        keys = i * KEYS + tl.arange(0, KEYS)
        v = load_values(problem, tile.b, tile.h, keys, VALUE_WIDTH)
        # (queries, keys) x (keys, VALUE_WIDTH), added to the output in float32
        output = tl.dot(alpha.to(v.dtype), v, output, input_precision=PRECISION)
    store_output(m, statistics, problem, tile, output, origin, shift)
