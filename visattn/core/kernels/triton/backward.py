"""The backward kernels: gradients of queries, of keys and values, and of a bias.

Every number is written by one program. With alpha = f(e; origin, shift) and slope = d alpha / d e,
the gradient of a score is slope (d alpha - delta), where delta is zero except for the entmax
family, whose rows sum to one: there it is the row's mean of d alpha, weighted by slope.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from visattn.core.kernels.triton.forward import load_statistic
from visattn.core.kernels.triton.problem import (
    KeyTile,
    key_scores,
    key_tile,
    load_keys,
    load_output_grads,
    load_queries,
    load_values,
    query_scores,
    query_tile,
    row_index,
    store_rows,
)
from visattn.core.kernels.triton.weights import TINY, exponent, weigh


class GradTile(NamedTuple):
    """What the backward pass reads for a tile of queries: d m, origin, shift and the exponent."""

    grad: Any
    origin: Any
    shift: Any
    p: Any


@triton.jit
def store_query_grads(problem, x, tile, value):
    """Write the gradients of a tile of queries, (ROWS, WIDTH)."""
    WIDTH: tl.constexpr = value.shape[1]
    store_rows(x, tile.b, tile.h, tile.rows, problem.queries, problem.width, value, WIDTH)


@triton.jit
def store_key_grads(problem, x, tile, width, value):
    """Write the gradients of a tile of keys or of their values, (KEYS, WIDTH)."""
    WIDTH: tl.constexpr = value.shape[1]
    store_rows(x, tile.b, tile.h, tile.keys, problem.keys, width, value, WIDTH)


@triton.jit
def key_tile_grads(
    problem,
    tile,
    row,
    keys,
    KERNEL: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Return weights, slopes and the gradient of the weights for one tile of keys."""
    e = key_scores(problem, tile, keys, PRECISION)  # (queries, keys)
    origin = row.origin[:, None]
    shift = row.shift[:, None]
    alpha, slope = weigh(e, origin, shift, row.p, KERNEL)
    v = load_values(problem, tile.b, tile.h, keys, row.grad.shape[1])
    # (queries, VALUE_WIDTH) x (VALUE_WIDTH, keys)
    dalpha = tl.dot(row.grad, tl.trans(v), input_precision=PRECISION)
    return alpha, slope, dalpha


@triton.jit
def mean_grad(
    problem,
    tile,
    row,
    exponent_grads,
    KERNEL: tl.constexpr,
    PRECISION: tl.constexpr,
    KEYS: tl.constexpr,
):
    """Return delta and a row's gradient by entmax's alpha, zero where ``exponent_grads`` is None.

    At fixed scores the derivative of a weight alpha_i = r_i^p by entmax's alpha is proportional to
    d_i - s_i sum d / sum s, d_i = p^2 alpha_i (1 - ln r_i), s the slopes.
    """
    dalpha_sum = tl.zeros_like(row.origin)
    slope_sum = tl.zeros_like(row.origin)
    exponent_grad = tl.zeros_like(row.origin)
    direction_sum = tl.zeros_like(row.origin)
    for first in range(0, problem.keys, KEYS):
        keys = first + tl.arange(0, KEYS)
        alpha, slope, dalpha = key_tile_grads(problem, tile, row, keys, KERNEL, PRECISION)
        dalpha_sum += tl.sum(slope * dalpha, 1)
        slope_sum += tl.sum(slope, 1)
        if exponent_grads is not None:
            # d of the docstring; a zero weight gives zero, whatever its logarithm.
            scaled_alpha = row.p * row.p * alpha
            log_r = tl.log(tl.maximum(alpha, TINY)) / row.p
            direction = scaled_alpha * (1 - log_r)
            exponent_grad += tl.sum(direction * dalpha, 1)
            direction_sum += tl.sum(direction, 1)
    # A row without any key has no slope.
    delta = tl.where(slope_sum > 0, dalpha_sum / tl.maximum(slope_sum, TINY), 0.0)
    return delta, exponent_grad - delta * direction_sum


@triton.jit
def query_grad(
    problem,
    grads,
    statistics,
    deltas,
    row_sums,
    exponent_grads,
    dq,
    KERNEL: tl.constexpr,
    SUMS_TO_ONE: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
):
    """Write dq and delta, and what is not None of the following.

    ``row_sums`` are the sums of a row's score gradients, ``exponent_grads`` a row's gradient by
    entmax's alpha; all are (B, H, Nq).
    """
    tile = query_tile(problem, ROWS, WIDTH)
    inside = tile.rows < problem.queries
    index = row_index(problem, tile.b, tile.h, tile.rows)
    grad = load_output_grads(problem, grads, tile.b, tile.h, tile.rows, VALUE_WIDTH)
    origin, shift = load_statistic(statistics, problem, tile.b, tile.h, tile.rows)
    row = GradTile(grad, origin, shift, exponent(problem, tile.h, KERNEL))
    delta = tl.zeros_like(origin)
    if SUMS_TO_ONE:
        delta, exponent_grad = mean_grad(
            problem, tile, row, exponent_grads, KERNEL, PRECISION, KEYS
        )
        # The kernels of keys and bias read it.
        tl.store(deltas + index, delta, mask=inside)
        if exponent_grads is not None:
            tl.store(exponent_grads + index, exponent_grad, mask=inside)
    total = tl.zeros((ROWS, WIDTH), tl.float32)
    row_sum = tl.zeros_like(delta)
    for first in range(0, problem.keys, KEYS):
        keys = first + tl.arange(0, KEYS)
        _, slope, dalpha = key_tile_grads(problem, tile, row, keys, KERNEL, PRECISION)
        # de: gradient of the scores, (queries, keys)
        de = slope * (dalpha - delta[:, None])
        if row_sums is not None:
            # (queries, keys) -> one sum per query
            row_sum += tl.sum(de, 1)
        k = load_keys(problem, tile.b, tile.h, keys, WIDTH)
        # dq = de k
        total = tl.dot(de.to(k.dtype), k, total, input_precision=PRECISION)
    store_query_grads(problem, dq, tile, total * problem.scale)
    if row_sums is not None:
        tl.store(row_sums + index, row_sum, mask=inside)


@triton.jit
def query_tile_grads(
    problem,
    tile,
    v,
    first,
    grads,
    statistics,
    deltas,
    KERNEL: tl.constexpr,
    SUMS_TO_ONE: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Return q and output gradients of a tile of queries, and weights and score gradients.

    The last two are (keys, queries), for the tile of keys ``tile`` with the values ``v``.
    """
    b = tile.b
    h = tile.h
    rows = first + tl.arange(0, ROWS)
    q = load_queries(problem, b, h, rows, tile.k.shape[1])
    grad = load_output_grads(problem, grads, b, h, rows, v.shape[1])
    origin, shift = load_statistic(statistics, problem, b, h, rows)
    # e, alpha, slope, dalpha: (keys, queries)
    e = query_scores(problem, tile, q, rows, PRECISION)
    p = exponent(problem, h, KERNEL)
    alpha, slope = weigh(e, origin[None, :], shift[None, :], p, KERNEL)
    dalpha = tl.dot(v, tl.trans(grad), input_precision=PRECISION)
    if SUMS_TO_ONE:
        index = row_index(problem, b, h, rows)
        delta = tl.load(deltas + index, mask=rows < problem.queries, other=0.0)
        dalpha -= delta[None, :]
    return q, grad, alpha, slope * dalpha


@triton.jit
def key_grad(
    problem,
    grads,
    statistics,
    deltas,
    dk,
    dv,
    column_sums,
    KERNEL: tl.constexpr,
    SUMS_TO_ONE: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
):
    """Write dk and dv and, where not None, ``column_sums``: score gradients summed over queries."""
    tile = key_tile(problem, KEYS, WIDTH)
    v = load_values(problem, tile.b, tile.h, tile.keys, VALUE_WIDTH)
    key_total = tl.zeros((KEYS, WIDTH), tl.float32)
    value_total = tl.zeros((KEYS, VALUE_WIDTH), tl.float32)
    column_sum = tl.zeros((KEYS,), tl.float32)
    for first in range(0, problem.queries, ROWS):
        q, grad, alpha, de = query_tile_grads(
            problem,
            tile,
            v,
            first,
            grads,
            statistics,
            deltas,
            KERNEL,
            SUMS_TO_ONE,
            PRECISION,
            ROWS,
        )
        # dv = alpha^T d m and dk = de^T q; both are transposed already
        value_total = tl.dot(alpha.to(grad.dtype), grad, value_total, input_precision=PRECISION)
        key_total = tl.dot(de.to(q.dtype), q, key_total, input_precision=PRECISION)
        if column_sums is not None:
            # (keys, queries) -> one sum per key
            column_sum += tl.sum(de, 1)
    store_key_grads(problem, dk, tile, problem.width, key_total * problem.scale)
    store_key_grads(problem, dv, tile, problem.value_width, value_total)
    if column_sums is not None:
        index = (tile.b * problem.heads + tile.h) * problem.keys + tile.keys
        tl.store(column_sums + index, column_sum, mask=tile.keys < problem.keys)


@triton.jit
def bias_grad(
    problem,
    grads,
    statistics,
    deltas,
    parts,
    images,
    bias_images,
    bias_heads,
    share,
    KERNEL: tl.constexpr,
    SUMS_TO_ONE: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
):
    """Write one tile of the bias's gradient, summed over a share of its readers.

    A reader is an image and head that reads the tile; one program sums ``share`` of them. ``parts``
    is (shares, bias_images, bias_heads, Nk, Nq): the last two axes are
    swapped.
    """
    # program -> (share and image and head of the bias, tile of queries, tile of keys)
    row_tiles = tl.cdiv(problem.queries, ROWS)
    key_tiles = tl.cdiv(problem.keys, KEYS)
    owner = tl.program_id(0) // (row_tiles * key_tiles)
    bias_head = owner % bias_heads
    bias_image = owner // bias_heads % bias_images
    readers_per_image = problem.heads // bias_heads
    # Images and heads that read one tile of the bias.
    readers = readers_per_image * (images // bias_images)
    part = owner // (bias_heads * bias_images)
    keys = tl.program_id(0) % key_tiles * KEYS + tl.arange(0, KEYS)
    first = tl.program_id(0) // key_tiles % row_tiles * ROWS
    total = tl.zeros((KEYS, ROWS), tl.float32)
    for reader in range(part * share, tl.minimum((part + 1) * share, readers)):
        # An axis of size one is read by all; a whole one by its own image or head.
        b = (bias_image + reader // readers_per_image).to(tl.int64)
        h = (bias_head + reader % readers_per_image).to(tl.int64)
        k = load_keys(problem, b, h, keys, WIDTH)
        v = load_values(problem, b, h, keys, VALUE_WIDTH)
        total += query_tile_grads(
            problem,
            KeyTile(b, h, keys, k),
            v,
            first,
            grads,
            statistics,
            deltas,
            KERNEL,
            SUMS_TO_ONE,
            PRECISION,
            ROWS,
        )[3]
    rows = first + tl.arange(0, ROWS)
    inside = (keys[:, None] < problem.keys) & (rows[None, :] < problem.queries)
    column_start = (owner.to(tl.int64) * problem.keys + keys[:, None]) * problem.queries
    tl.store(parts + (column_start + rows[None, :]), total, mask=inside)
