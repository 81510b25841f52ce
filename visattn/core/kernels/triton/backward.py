"""The backward kernels, one writer for every number: gradients of queries, of keys and values, and of a bias.

With alpha = f(e; origin, shift) and s = d alpha / d e, the gradient of a score is s (d alpha -
delta), where delta is the mean of d alpha weighed by s over the row for the entmax family, whose
rows sum to one, and zero otherwise.
"""

import triton
import triton.language as tl

from visattn.core.kernels.triton.forward import load_statistic
from visattn.core.kernels.triton.problem import (
    key_scores,
    key_tile,
    load_rows,
    query_tile,
    scores,
    store_rows,
)
from visattn.core.kernels.triton.weights import TINY, exponent, weigh


@triton.jit
def key_tile_grads(
    problem, b, h, q, grad, rows, first, origin, shift, p, KIND, PRECISION, WIDTH, VALUE_WIDTH, KEYS
):
    """Return weights, slopes and the gradient of the weights for one tile of keys, with the keys."""
    keys = first + tl.arange(0, KEYS)
    e = key_scores(problem, b, h, q, rows, keys, PRECISION, WIDTH)
    alpha, slope = weigh(e, origin[:, None], shift[:, None], p, KIND)
    v = load_rows(problem.v, b, h, keys, problem.keys, problem.value_width, VALUE_WIDTH)
    return alpha, slope, tl.dot(grad, tl.trans(v), input_precision=PRECISION), keys


@triton.jit
def mean_grad(
    problem, b, h, q, grad, rows, origin, shift, p, turns, KIND, PRECISION, WIDTH, VALUE_WIDTH, KEYS
):
    """Return delta and, where ``turns`` is given, the gradient by alpha of every row (zero otherwise).

    At fixed scores alpha_i = r_i^p turns with alpha by d_i - s_i sum d / sum s, d_i = p^2 alpha_i
    (1 - ln r_i).
    """
    total, weight = tl.zeros_like(origin), tl.zeros_like(origin)
    turn, turned = tl.zeros_like(origin), tl.zeros_like(origin)
    for first in range(0, problem.keys, KEYS):
        alpha, slope, dalpha, _ = key_tile_grads(
            problem,
            b,
            h,
            q,
            grad,
            rows,
            first,
            origin,
            shift,
            p,
            KIND,
            PRECISION,
            WIDTH,
            VALUE_WIDTH,
            KEYS,
        )
        total += tl.sum(slope * dalpha, 1)
        weight += tl.sum(slope, 1)
        if turns is not None:
            direction = p * p * alpha * (1 - tl.log(tl.maximum(alpha, TINY)) / p)
            turn += tl.sum(direction * dalpha, 1)
            turned += tl.sum(direction, 1)
    delta = tl.where(weight > 0, total / tl.maximum(weight, TINY), 0.0)
    return delta, turn - delta * turned


@triton.jit
def query_grad(
    problem,
    grads,
    statistics,
    deltas,
    row_sums,
    turns,
    dq,
    KIND: tl.constexpr,
    SUMS_TO_ONE: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
):
    """Write dq and delta and, where wanted, the sum of a row's score gradients and a row's gradient by alpha."""
    b, h, rows, q = query_tile(problem, ROWS, WIDTH)
    inside = rows < problem.queries
    place = (b * problem.heads + h) * problem.queries + rows
    grad = load_rows(grads, b, h, rows, problem.queries, problem.value_width, VALUE_WIDTH)
    origin, shift = load_statistic(statistics, problem, b, h, rows)
    p = exponent(problem, h, KIND)
    delta = tl.zeros_like(origin)
    if SUMS_TO_ONE:
        delta, turn = mean_grad(
            problem,
            b,
            h,
            q,
            grad,
            rows,
            origin,
            shift,
            p,
            turns,
            KIND,
            PRECISION,
            WIDTH,
            VALUE_WIDTH,
            KEYS,
        )
        tl.store(deltas + place, delta, mask=inside)
        if turns is not None:
            tl.store(turns + place, turn, mask=inside)
    result, row_sum = tl.zeros((ROWS, WIDTH), tl.float32), tl.zeros_like(delta)
    for first in range(0, problem.keys, KEYS):
        _, slope, dalpha, keys = key_tile_grads(
            problem,
            b,
            h,
            q,
            grad,
            rows,
            first,
            origin,
            shift,
            p,
            KIND,
            PRECISION,
            WIDTH,
            VALUE_WIDTH,
            KEYS,
        )
        de = slope * (dalpha - delta[:, None])
        if row_sums is not None:
            row_sum += tl.sum(de, 1)
        k = load_rows(problem.k, b, h, keys, problem.keys, problem.width, WIDTH)
        result = tl.dot(de.to(k.dtype), k, result, input_precision=PRECISION)
    store_rows(dq, b, h, rows, problem.queries, problem.width, result * problem.scale, WIDTH)
    if row_sums is not None:
        tl.store(row_sums + place, row_sum, mask=inside)


@triton.jit
def query_tile_grads(
    problem, b, h, k, v, keys, first, grads, statistics, deltas, KIND, SUMS_TO_ONE, PRECISION, ROWS
):
    """Return, for a tile of queries: queries, output gradients, and, transposed, weights and gradient of the scores."""
    rows = first + tl.arange(0, ROWS)
    q = load_rows(problem.q, b, h, rows, problem.queries, problem.width, k.shape[1])
    grad = load_rows(grads, b, h, rows, problem.queries, problem.value_width, v.shape[1])
    origin, shift = load_statistic(statistics, problem, b, h, rows)
    e = scores(problem, b, h, k, q, rows[None, :], keys[:, None], PRECISION)
    alpha, slope = weigh(e, origin[None, :], shift[None, :], exponent(problem, h, KIND), KIND)
    dalpha = tl.dot(v, tl.trans(grad), input_precision=PRECISION)
    if SUMS_TO_ONE:
        place = (b * problem.heads + h) * problem.queries + rows
        dalpha -= tl.load(deltas + place, mask=rows < problem.queries, other=0.0)[None, :]
    return q, grad, alpha, slope * dalpha


@triton.jit
def key_grad(
    problem,
    grads,
    statistics,
    deltas,
    dk,
    dv,
    columns,
    KIND: tl.constexpr,
    SUMS_TO_ONE: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
):
    """Write dk and dv and, where ``columns`` is given, the sum over queries of the gradient of the scores."""
    b, h, keys, k = key_tile(problem, KEYS, WIDTH)
    v = load_rows(problem.v, b, h, keys, problem.keys, problem.value_width, VALUE_WIDTH)
    key_total = tl.zeros((KEYS, WIDTH), tl.float32)
    value_total = tl.zeros((KEYS, VALUE_WIDTH), tl.float32)
    column = tl.zeros((KEYS,), tl.float32)
    for first in range(0, problem.queries, ROWS):
        q, grad, alpha, de = query_tile_grads(
            problem,
            b,
            h,
            k,
            v,
            keys,
            first,
            grads,
            statistics,
            deltas,
            KIND,
            SUMS_TO_ONE,
            PRECISION,
            ROWS,
        )
        value_total = tl.dot(alpha.to(grad.dtype), grad, value_total, input_precision=PRECISION)
        key_total = tl.dot(de.to(q.dtype), q, key_total, input_precision=PRECISION)
        if columns is not None:
            column += tl.sum(de, 1)
    store_rows(dk, b, h, keys, problem.keys, problem.width, key_total * problem.scale, WIDTH)
    store_rows(dv, b, h, keys, problem.keys, problem.value_width, value_total, VALUE_WIDTH)
    if columns is not None:
        tl.store(
            columns + (b * problem.heads + h) * problem.keys + keys,
            column,
            mask=keys < problem.keys,
        )


@triton.jit
def bias_grad(
    problem,
    grads,
    statistics,
    deltas,
    parts,
    images,
    own_images,
    own_heads,
    share,
    KIND: tl.constexpr,
    SUMS_TO_ONE: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
):
    """Write one tile of the bias's gradient, summed over a share of the images and heads that read it.

    ``parts`` is (shares, own_images, own_heads, Nk, Nq), the last two the other way round.
    """
    row_tiles, key_tiles = tl.cdiv(problem.queries, ROWS), tl.cdiv(problem.keys, KEYS)
    owner = tl.program_id(0) // (row_tiles * key_tiles)
    own_head, own_image = owner % own_heads, owner // own_heads % own_images
    readers_per_image = problem.heads // own_heads
    readers = readers_per_image * (images // own_images)
    part = owner // (own_heads * own_images)
    keys = tl.program_id(0) % key_tiles * KEYS + tl.arange(0, KEYS)
    first = tl.program_id(0) // key_tiles % row_tiles * ROWS
    total = tl.zeros((KEYS, ROWS), tl.float32)
    for reader in range(part * share, tl.minimum((part + 1) * share, readers)):
        b = (own_image + reader // readers_per_image).to(tl.int64)
        h = (own_head + reader % readers_per_image).to(tl.int64)
        k = load_rows(problem.k, b, h, keys, problem.keys, problem.width, WIDTH)
        v = load_rows(problem.v, b, h, keys, problem.keys, problem.value_width, VALUE_WIDTH)
        total += query_tile_grads(
            problem,
            b,
            h,
            k,
            v,
            keys,
            first,
            grads,
            statistics,
            deltas,
            KIND,
            SUMS_TO_ONE,
            PRECISION,
            ROWS,
        )[3]
    rows = first + tl.arange(0, ROWS)
    place = (owner.to(tl.int64) * problem.keys + keys[:, None]) * problem.queries + rows[None, :]
    tl.store(
        parts + place,
        total,
        mask=(keys[:, None] < problem.keys) & (rows[None, :] < problem.queries),
    )
