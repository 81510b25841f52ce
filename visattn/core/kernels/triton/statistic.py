"""The two numbers of a row, origin and shift, from keys that stream by or from a row of scores that stays on chip."""

import triton
import triton.language as tl

from visattn.core.kernels.triton.problem import key_scores, limit
from visattn.core.kernels.triton.weights import finite, newton, powers, start, tally

STEPS = tl.constexpr(20)
TOLERANCE = tl.constexpr(1e-6)


@triton.jit
def statistic(
    problem,
    b,
    h,
    q,
    rows,
    p,
    KIND: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDTH: tl.constexpr,
    KEYS: tl.constexpr,
):
    """Return origin and shift of every row, passing over the keys as often as the normalizer needs."""
    if KIND == "sigmoid" or KIND == "relu":
        count = tl.maximum(key_count(problem, b, h, rows, KEYS), 1.0)
        origin = tl.zeros_like(count)
        shift = tl.log(count) if KIND == "sigmoid" else 1 / count
    elif KIND == "softmax":
        origin = log_sum_exp(problem, b, h, q, rows, PRECISION, WIDTH, KEYS)
        shift = tl.zeros_like(origin)
    else:
        origin, shift = threshold(problem, b, h, q, rows, p, KIND, PRECISION, WIDTH, KEYS)
    return origin, shift


@triton.jit
def key_count(problem, b, h, rows, KEYS: tl.constexpr):
    """Return how many keys each row may attend."""
    count = tl.zeros_like(rows).to(tl.float32)
    if problem.bias is None and problem.mask is None:
        count += problem.keys
    else:
        for first in range(0, problem.keys, KEYS):
            keys = first + tl.arange(0, KEYS)
            zeros = tl.zeros((rows.shape[0], KEYS), tl.float32)
            count += tally(limit(problem, b, h, zeros, rows[:, None], keys[None, :]))[2]
    return count


@triton.jit
def log_sum_exp(
    problem, b, h, q, rows, PRECISION: tl.constexpr, WIDTH: tl.constexpr, KEYS: tl.constexpr
):
    top = tl.zeros_like(rows).to(tl.float32) + float("-inf")
    total = tl.zeros_like(top)
    for first in range(0, problem.keys, KEYS):
        e = key_scores(problem, b, h, q, rows, first + tl.arange(0, KEYS), PRECISION, WIDTH)
        higher = tl.maximum(top, tl.max(e, 1))
        total = total * tl.exp(top - finite(higher)) + tl.sum(
            tl.exp(e - finite(higher)[:, None]), 1
        )
        top = higher
    return tl.where(total > 0, finite(top) + tl.log(tl.maximum(total, 1.0)), 0.0)


@triton.jit
def threshold(
    problem,
    b,
    h,
    q,
    rows,
    p,
    KIND: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDTH: tl.constexpr,
    KEYS: tl.constexpr,
):
    """Newton's method on the p-norm, the scores recomputed for every step."""
    top = tl.zeros_like(rows).to(tl.float32) + float("-inf")
    total, count = tl.zeros_like(top), tl.zeros_like(top)
    for first in range(0, problem.keys, KEYS):
        e = key_scores(problem, b, h, q, rows, first + tl.arange(0, KEYS), PRECISION, WIDTH)
        tile_top, tile_total, tile_count = tally(e)
        top = tl.maximum(top, tile_top)
        total += tile_total
        count += tile_count
    origin = finite(top)
    shift = start(origin, total, count, p)
    step, moved = 0, 1.0
    while (step < STEPS) & (moved > TOLERANCE):
        power, slope = tl.zeros_like(top), tl.zeros_like(top)
        for first in range(0, problem.keys, KEYS):
            e = key_scores(problem, b, h, q, rows, first + tl.arange(0, KEYS), PRECISION, WIDTH)
            tile_power, tile_slope = powers(
                tl.maximum((e - origin[:, None]) * (1 / p) - shift[:, None], 0.0), p, KIND
            )
            power += tl.sum(tile_power, 1)
            slope += tl.sum(tile_slope, 1)
        move = newton(power, slope, p, KIND)
        shift += move
        moved = tl.max(tl.abs(move), 0)
        step += 1
    return origin, shift


@triton.jit
def threshold_on_chip(e, p, KIND: tl.constexpr, TILES: tl.constexpr):
    """Newton's method on tiles of scores that are all at hand; return origin, shift and the tiles of x."""
    top, total, count = tally(e[0])
    for i in tl.static_range(1, TILES):
        tile_top, tile_total, tile_count = tally(e[i])
        top = tl.maximum(top, tile_top)
        total += tile_total
        count += tile_count
    origin = finite(top)
    x = ()
    for i in tl.static_range(TILES):
        x = x + ((e[i] - origin[:, None]) * (1 / p),)  # noqa: RUF005 (the compiler knows no star)
    shift = start(origin, total, count, p)
    step, moved = 0, 1.0
    while (step < STEPS) & (moved > TOLERANCE):
        power, slope = tl.zeros_like(top), tl.zeros_like(top)
        for i in tl.static_range(TILES):
            tile_power, tile_slope = powers(tl.maximum(x[i] - shift[:, None], 0.0), p, KIND)
            power += tl.sum(tile_power, 1)
            slope += tl.sum(tile_slope, 1)
        move = newton(power, slope, p, KIND)
        shift += move
        moved = tl.max(tl.abs(move), 0)
        step += 1
    return origin, shift, x
