"""The two numbers of a row, origin and shift: see ``weights``.

They come from keys that are streamed, or from a row of scores that stays in registers.
"""

import triton
import triton.language as tl

from visattn.core.kernels.triton.problem import key_scores, limit
from visattn.core.kernels.triton.weights import finite, newton, powers, start, tally

STEPS = tl.constexpr(20)
TOLERANCE = tl.constexpr(1e-6)


@triton.jit
def statistic(
    problem,
    tile,
    p,
    KERNEL: tl.constexpr,
    PRECISION: tl.constexpr,
    KEYS: tl.constexpr,
):
    """Return origin and shift of every row, with as many passes over the keys as it takes."""
    if KERNEL == "sigmoid":
        # sigmoid(e - log count)
        count = key_count(problem, tile, KEYS)
        origin = tl.zeros_like(count)
        shift = tl.log(count)
    elif KERNEL == "relu":
        # max(e, 0) / count
        count = key_count(problem, tile, KEYS)
        origin = tl.zeros_like(count)
        shift = 1 / count
    elif KERNEL == "softmax":
        # exp(e - log sum exp)
        origin = log_sum_exp(problem, tile, PRECISION, KEYS)
        shift = tl.zeros_like(origin)
    else:
        origin, shift = threshold(problem, tile, p, KERNEL, PRECISION, KEYS)
    return origin, shift


@triton.jit
def key_count(problem, tile, KEYS: tl.constexpr):
    """Return how many keys each row may attend, one at least."""
    count = tl.zeros_like(tile.rows).to(tl.float32)
    if problem.bias is None and problem.mask is None:
        count += problem.keys
    else:
        for first in range(0, problem.keys, KEYS):
            keys = first + tl.arange(0, KEYS)
            # Bias and mask alone decide which keys may be attended: no scores are needed.
            zeros = tl.zeros((tile.rows.shape[0], KEYS), tl.float32)
            rows = tile.rows[:, None]
            e = limit(problem, tile.b, tile.h, zeros, rows, keys[None, :])
            count += tally(e)[2]
    return tl.maximum(count, 1.0)


@triton.jit
def log_sum_exp(problem, tile, PRECISION: tl.constexpr, KEYS: tl.constexpr):
    top = tl.zeros_like(tile.rows).to(tl.float32) + float("-inf")
    total = tl.zeros_like(top)
    for first in range(0, problem.keys, KEYS):
        e = key_scores(problem, tile, first + tl.arange(0, KEYS), PRECISION)
        # The sum so far is relative to the largest score so far.
        higher = tl.maximum(top, tl.max(e, 1))
        rescaled = total * tl.exp(top - finite(higher))
        total = rescaled + tl.sum(tl.exp(e - finite(higher)[:, None]), 1)
        top = higher
    # The largest score contributes 1 to the sum; a row without any key gets 0.
    lse = finite(top) + tl.log(tl.maximum(total, 1.0))
    return tl.where(total > 0, lse, 0.0)


@triton.jit
def threshold(
    problem,
    tile,
    p,
    KERNEL: tl.constexpr,
    PRECISION: tl.constexpr,
    KEYS: tl.constexpr,
):
    """Newton's method on the p-norm, the scores recomputed for every step."""
    top = tl.zeros_like(tile.rows).to(tl.float32) + float("-inf")
    total = tl.zeros_like(top)
    count = tl.zeros_like(top)
    for first in range(0, problem.keys, KEYS):
        # First pass: maximum, sum and number of the scores.
        e = key_scores(problem, tile, first + tl.arange(0, KEYS), PRECISION)
        tile_top, tile_total, tile_count = tally(e)
        top = tl.maximum(top, tile_top)
        total += tile_total
        count += tile_count
    origin = finite(top)
    shift = start(origin, total, count, p)
    step = 0
    largest_move = 1.0
    while (step < STEPS) & (largest_move > TOLERANCE):
        power = tl.zeros_like(top)
        slope = tl.zeros_like(top)
        for first in range(0, problem.keys, KEYS):
            e = key_scores(problem, tile, first + tl.arange(0, KEYS), PRECISION)
            # Every step is one more pass: (queries, keys) -> two sums per row.
            x = (e - origin[:, None]) * (1 / p)
            r = tl.maximum(x - shift[:, None], 0.0)
            tile_power, tile_slope = powers(r, p, KERNEL)
            power += tl.sum(tile_power, 1)
            slope += tl.sum(tile_slope, 1)
        move = newton(power, slope, p, KERNEL)
        shift += move
        largest_move = tl.max(tl.abs(move), 0)
        step += 1
    return origin, shift


@triton.jit
def threshold_on_chip(e, p, KERNEL: tl.constexpr, TILES: tl.constexpr):
    """Newton's method on TILES tiles of scores in registers.

    Return origin, shift and the tiles of x = (e - origin) / p.
    """
    top, total, count = tally(e[0])
    for i in tl.static_range(1, TILES):
        tile_top, tile_total, tile_count = tally(e[i])
        top = tl.maximum(top, tile_top)
        total += tile_total
        count += tile_count
    origin = finite(top)
    x = ()
    for i in tl.static_range(TILES):
        # x is at most 0: thresholds of huge scores keep their digits
        tile_x = (e[i] - origin[:, None]) * (1 / p)
        # The compiler knows neither a star nor an annotation of the empty tuple.
        x = x + (tile_x,)  # type: ignore[assignment]  # noqa: RUF005
    shift = start(origin, total, count, p)
    step = 0
    largest_move = 1.0
    # The tile's rows stop together, when the slowest of them has converged.
    while (step < STEPS) & (largest_move > TOLERANCE):
        power = tl.zeros_like(top)
        slope = tl.zeros_like(top)
        for i in tl.static_range(TILES):
            r = tl.maximum(x[i] - shift[:, None], 0.0)
            tile_power, tile_slope = powers(r, p, KERNEL)
            power += tl.sum(tile_power, 1)
            slope += tl.sum(tile_slope, 1)
        move = newton(power, slope, p, KERNEL)
        shift += move
        largest_move = tl.max(tl.abs(move), 0)
        step += 1
    return origin, shift, x
