"""From tensors to kernels: the problem, the tiles, the grid."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.runtime.errors import OutOfResources

from visattn.core.kernels.triton.backward import bias_grad, key_grad, query_grad
from visattn.core.kernels.triton.chain import chain_row, row_statistic
from visattn.core.kernels.triton.forward import attend_on_chip, attend_streamed
from visattn.core.kernels.triton.problem import Pairs, Problem, Rows

SUMS_TO_ONE = ("sparsemax", "entmax15", "entmax")
ON_CHIP = 1024  # keys: above, whole rows of scores do not fit into registers
# A bias's gradient is cut into about as many programs; fixed, so that sums never change their order
_PROGRAMS = 512


class Tiles(NamedTuple):
    """Queries and keys of a tile, and how the compiler schedules them."""

    rows: int
    keys: int
    warps: int
    stages: int


# Largest bytes of a token's widest row -> tiles, so that all of them fit into shared memory.
_FORWARD_TILES = {
    128: Tiles(128, 64, 4, 3),
    256: Tiles(64, 64, 4, 2),
    512: Tiles(64, 32, 4, 2),
}
_BACKWARD_TILES = {
    128: Tiles(64, 64, 4, 2),
    256: Tiles(64, 64, 8, 2),
    512: Tiles(32, 32, 4, 1),
}
# Wider rows.
_SMALL_FORWARD_TILES = Tiles(32, 32, 4, 1)
_SMALL_BACKWARD_TILES = Tiles(16, 16, 4, 1)


class Sums(NamedTuple):
    """Optional outputs of the backward kernels, float32.

    Score gradients summed over a row (B, H, Nq, 1), over a column (B, H, 1, Nk), and a row's
    gradient by entmax's alpha (B, H, Nq).
    """

    rows: Tensor | None
    columns: Tensor | None
    exponent_grads: Tensor | None


def dense_rows(x: Tensor) -> Tensor:
    """Return ``x`` with channels side by side in memory."""
    if x.stride(-1) == 1:
        return x
    return x.contiguous()


def describe_problem(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    bias: Tensor | None,
    mask: Tensor | None,
    p: Tensor | None,
    scale: float,
) -> Problem:
    """Collect pointers, strides and sizes of one call: q (B, H, Nq, D), k and v (B, Hk, Nk, ..)."""
    heads = q.shape[1]
    values = None
    value_width = k.shape[3]
    if v is not None:
        values = Rows.of(v, heads // v.shape[1])
        value_width = v.shape[3]
    if mask is not None:
        mask = mask.view(torch.uint8)  # the kernels read booleans as bytes
    return Problem(
        Rows.of(q),
        Rows.of(k, heads // k.shape[1]),
        values,
        None if bias is None else Pairs.of(bias),
        None if mask is None else Pairs.of(mask),
        p,
        scale,
        heads,
        q.shape[2],
        k.shape[2],
        q.shape[3],
        value_width,
    )


def forward(
    problem: Problem,
    kernel: str,
    m: Tensor,
    statistic: Tensor,
) -> None:
    """Fill m and the two numbers of every row."""
    fits_on_chip = problem.keys <= ON_CHIP and _row_bytes(problem, m.dtype) <= 512
    on_chip = kernel in SUMS_TO_ONE and fits_on_chip
    tiles = _on_chip_tiles(problem, m.dtype) if on_chip else stream_tiles(problem, m.dtype)
    arguments = (
        problem,
        Rows.of(m),
        statistic,
        kernel,
        precision(m.dtype),
        *widths(problem),
        tiles.rows,
        tiles.keys,
    )
    # Both kernels take the same arguments; only the first needs the number of key tiles.
    if on_chip:
        key_tiles = triton.cdiv(problem.keys, tiles.keys)
        launch(attend_on_chip, m, problem.queries, tiles.rows, tiles, *arguments, key_tiles)
    else:
        launch(attend_streamed, m, problem.queries, tiles.rows, tiles, *arguments)


def backward(
    problem: Problem,
    kernel: str,
    grad: Tensor,
    statistic: Tensor,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    sums: Sums,
) -> Tensor:
    """Fill dq, dk and dv of every query head, and ``sums``; return delta, (B, H, Nq)."""
    # Written by the first kernel, read by the others.
    delta = grad.new_empty(grad.shape[:3], dtype=torch.float32)
    tiles = stream_tiles(problem, grad.dtype, backward=True)
    constants = _backward_constants(problem, kernel, grad.dtype, tiles)
    operands = (problem, Rows.of(grad), statistic, delta)
    # One program per tile of queries: dq, delta, row sums.
    launch(
        query_grad,
        grad,
        problem.queries,
        tiles.rows,
        tiles,
        *operands,
        sums.rows,
        sums.exponent_grads,
        Rows.of(dq),
        *constants,
    )
    # One program per tile of keys: dk, dv, column sums.
    launch(
        key_grad,
        grad,
        problem.keys,
        tiles.keys,
        tiles,
        *operands,
        Rows.of(dk),
        Rows.of(dv),
        sums.columns,
        *constants,
    )
    return delta


def _backward_constants(
    problem: Problem,
    kernel: str,
    dtype: torch.dtype,
    tiles: Tiles,
) -> tuple[Any, ...]:
    """Return the compile-time arguments of the backward kernels."""
    return (
        kernel,
        kernel in SUMS_TO_ONE,
        precision(dtype),
        *widths(problem),
        tiles.rows,
        tiles.keys,
    )


def backward_bias(
    problem: Problem,
    kernel: str,
    grad: Tensor,
    statistic: Tensor,
    delta: Tensor,
    shape: torch.Size,
) -> Tensor:
    """Return the gradient, float32, of a bias of ``shape`` that differs by query and key."""
    images, heads = grad.shape[:2]
    bias_images, bias_heads = shape[:2]
    tiles = stream_tiles(problem, grad.dtype, backward=True)
    row_tiles = triton.cdiv(problem.queries, tiles.rows)
    key_tiles = triton.cdiv(problem.keys, tiles.keys)
    bias_tiles = row_tiles * key_tiles * bias_images * bias_heads
    # Where several images and heads read the same bias, programs share them, then sum.
    readers = images * heads // (bias_images * bias_heads)
    share = triton.cdiv(readers, min(readers, triton.cdiv(_PROGRAMS, bias_tiles)))
    shares = triton.cdiv(readers, share)
    parts = grad.new_empty(
        shares, bias_images, bias_heads, problem.keys, problem.queries, dtype=torch.float32
    )
    _run(
        bias_grad,
        bias_tiles * shares,
        grad.device,
        tiles,
        problem,
        Rows.of(grad),
        statistic,
        delta,
        parts,
        images,
        bias_images,
        bias_heads,
        share,
        *_backward_constants(problem, kernel, grad.dtype, tiles),
    )
    # (shares, .., Nk, Nq) -> (.., Nq, Nk)
    return parts.sum(0).transpose(2, 3)


def row_chain(
    problem: Problem,
    kernel: str,
    u: Tensor,
    grad: Tensor | None,
    q: Tensor,
    result: Tensor,
) -> None:
    """Fill result, (B, H, Nk), with u A of every head, or with u [A o G]+, G = grad v^T."""
    tiles = stream_tiles(problem, q.dtype, backward=True)
    statistic = q.new_empty((*q.shape[:3], 2), dtype=torch.float32)
    width, value_width = widths(problem)
    # First pass: the two numbers of every row.
    launch(
        row_statistic,
        q,
        problem.queries,
        tiles.rows,
        tiles,
        problem,
        statistic,
        kernel,
        precision(q.dtype),
        width,
        tiles.rows,
        tiles.keys,
    )
    # Second pass: one program per tile of keys.
    launch(
        chain_row,
        q,
        problem.keys,
        tiles.keys,
        tiles,
        problem,
        u,
        None if grad is None else Rows.of(grad),
        statistic,
        result,
        kernel,
        precision(q.dtype),
        width,
        value_width,
        tiles.rows,
        tiles.keys,
    )


def launch(
    function: Any,
    x: Tensor,
    count: int,
    size: int,
    tiles: Tiles,
    *arguments: object,
) -> None:
    """Run one program per ``size`` of ``count`` tokens, for every image and head of ``x``."""
    programs = triton.cdiv(count, size) * x.shape[0] * x.shape[1]
    _run(function, programs, x.device, tiles, *arguments)


def _run(
    function: Any,
    programs: int,
    device: torch.device,
    tiles: Tiles,
    *arguments: object,
) -> None:
    options = {"num_warps": tiles.warps, "enable_fp_fusion": True}
    grid = (programs,)
    with _current(device):
        try:
            function[grid](*arguments, num_stages=tiles.stages, **options)
        except OutOfResources:
            # Less shared memory than the largest GPUs have: no loads ahead of their use.
            function[grid](*arguments, num_stages=1, **options)


def _current(device: torch.device) -> AbstractContextManager:
    """Make a GPU the current one; Triton's interpreter needs none."""
    if device.type == "cuda":
        return torch.cuda.device(device)
    return nullcontext()


def precision(dtype: torch.dtype) -> str:
    """Return how tensor cores multiply float32.

    By three products in tf32, or by one where torch allows it.
    """
    if dtype != torch.float32:
        return "ieee"
    if torch.backends.cuda.matmul.fp32_precision == "tf32":
        return "tf32"
    return "tf32x3"


def widths(problem: Problem) -> tuple[int, int]:
    """Return the widths of keys and values as powers of two, 16 at least."""
    return _padded(problem.width), _padded(problem.value_width)


def _padded(size: int) -> int:
    return max(16, triton.next_power_of_2(size))


def _row_bytes(problem: Problem, dtype: torch.dtype) -> int:
    """Return the bytes of a token's widest row.

    float32 counts twice, since its products keep two parts of every number.
    """
    item_bytes = 8 if dtype == torch.float32 else dtype.itemsize
    return max(widths(problem)) * item_bytes


def stream_tiles(
    problem: Problem,
    dtype: torch.dtype,
    *,
    backward: bool = False,
) -> Tiles:
    """Choose tiles by the bytes of a token's widest row."""
    table = _FORWARD_TILES
    tiles = _SMALL_FORWARD_TILES
    if backward:
        table = _BACKWARD_TILES
        tiles = _SMALL_BACKWARD_TILES
    row_bytes = _row_bytes(problem, dtype)
    for limit in table:
        if row_bytes <= limit:
            tiles = table[limit]
            break
    return _shrink(tiles, problem)


def _on_chip_tiles(problem: Problem, dtype: torch.dtype) -> Tiles:
    """Choose how many whole rows of scores fit into a program's registers, as measured."""
    row_bytes = _row_bytes(problem, dtype)
    is_short = problem.keys <= 256
    if row_bytes > 256 or _differs_by_query(problem.bias) or _differs_by_query(problem.mask):
        tiles = Tiles(32, 64, 4, 1) if is_short else Tiles(16, 64, 8, 1)
    else:
        keys = min(128 if problem.keys <= 640 else 256, 32768 // row_bytes)
        tiles = Tiles(64, keys, 4, 1) if is_short else Tiles(32, keys, 8, 1)
    return _shrink(tiles, problem)


def _differs_by_query(pairs: Pairs | None) -> bool:
    return pairs is not None and pairs.row is not None


def _shrink(tiles: Tiles, problem: Problem) -> Tiles:
    """Return tiles no larger than the problem, 16 tokens at least."""
    rows = min(tiles.rows, _padded(problem.queries))
    keys = min(tiles.keys, _padded(problem.keys))
    return tiles._replace(rows=rows, keys=keys)
