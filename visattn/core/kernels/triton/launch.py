"""From tensors to kernels: the problem, the tiles, the grid."""

from contextlib import nullcontext
from typing import NamedTuple

import torch
import triton
from torch import Tensor
from triton.runtime.errors import OutOfResources

from visattn.core.kernels.triton.backward import bias_grad, key_grad, query_grad
from visattn.core.kernels.triton.chain import chain_row, row_statistic
from visattn.core.kernels.triton.forward import attend_on_chip, attend_streamed
from visattn.core.kernels.triton.problem import Pairs, Problem, Rows

ENTMAX = ("sparsemax", "entmax15", "entmax")
ON_CHIP = 1024  # keys: above, whole rows of scores do not fit into registers
_PROGRAMS = (
    512  # a bias's gradient is cut into about as many; fixed, so that sums never change their order
)


class Tiles(NamedTuple):
    """Queries and keys of a tile, and what the compiler is told."""

    rows: int
    keys: int
    warps: int
    stages: int


def dense_rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


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
    # The kernels read booleans as bytes.
    mask = None if mask is None else mask.view(torch.uint8)
    keys, values = (None if x is None else Rows.of(x, q.shape[1] // x.shape[1]) for x in (k, v))
    width = k.shape[3] if v is None else v.shape[3]
    sizes = (q.shape[1], q.shape[2], k.shape[2], q.shape[3], width)
    return Problem(Rows.of(q), keys, values, Pairs.of(bias), Pairs.of(mask), p, scale, *sizes)


def forward(problem: Problem, kind: str, m: Tensor, statistic: Tensor) -> None:
    """Fill m and the two numbers of every row."""
    common = (problem, Rows.of(m), statistic, kind, precision(m.dtype), *widths(problem))
    if kind in ENTMAX and problem.keys <= ON_CHIP and _row_bytes(problem, m.dtype) <= 512:
        tiles = _on_chip_tiles(problem, m.dtype)
        extra = (tiles.rows, tiles.keys, triton.cdiv(problem.keys, tiles.keys))
        kernel = attend_on_chip
    else:
        tiles = stream_tiles(problem, m.dtype)
        extra, kernel = (tiles.rows, tiles.keys), attend_streamed
    launch(kernel, m, problem.queries, tiles.rows, tiles, *common, *extra)


def backward(
    problem: Problem,
    kind: str,
    grad: Tensor,
    statistic: Tensor,
    found: tuple[Tensor, Tensor, Tensor],
    sums: tuple[Tensor | None, Tensor | None, Tensor | None],
) -> Tensor:
    """Fill dq, dk and dv of every query head, and the sums wanted: of a row, of a column, by alpha; return delta."""
    (dq, dk, dv), (row_sums, columns, turns) = found, sums
    delta = grad.new_empty(grad.shape[:3], dtype=torch.float32)
    tiles = stream_tiles(problem, grad.dtype, backward=True)
    meta = (kind, kind in ENTMAX, precision(grad.dtype), *widths(problem), tiles.rows, tiles.keys)
    shared = (problem, Rows.of(grad), statistic, delta)
    launch(
        query_grad,
        grad,
        problem.queries,
        tiles.rows,
        tiles,
        *shared,
        row_sums,
        turns,
        Rows.of(dq),
        *meta,
    )
    launch(
        key_grad,
        grad,
        problem.keys,
        tiles.keys,
        tiles,
        *shared,
        Rows.of(dk),
        Rows.of(dv),
        columns,
        *meta,
    )
    return delta


def backward_bias(
    problem: Problem, kind: str, grad: Tensor, statistic: Tensor, delta: Tensor, shape: torch.Size
) -> Tensor:
    """Return the gradient of a bias that differs by query and key, in float32, for its shape."""
    tiles = stream_tiles(problem, grad.dtype, backward=True)
    spots = (
        triton.cdiv(problem.queries, tiles.rows)
        * triton.cdiv(problem.keys, tiles.keys)
        * shape[0]
        * shape[1]
    )
    readers = grad.shape[0] * grad.shape[1] // (shape[0] * shape[1])
    share = triton.cdiv(readers, min(readers, triton.cdiv(_PROGRAMS, spots)))
    count = triton.cdiv(readers, share)
    parts = grad.new_empty(count, *shape[:2], problem.keys, problem.queries, dtype=torch.float32)
    meta = (kind, kind in ENTMAX, precision(grad.dtype), *widths(problem), tiles.rows, tiles.keys)
    sizes = (parts, grad.shape[0], shape[0], shape[1], share)
    _run(
        bias_grad,
        spots * count,
        grad.device,
        tiles,
        problem,
        Rows.of(grad),
        statistic,
        delta,
        *sizes,
        *meta,
    )
    return parts.sum(0).transpose(2, 3)


def row_chain(
    problem: Problem, kind: str, u: Tensor, grad: Tensor | None, q: Tensor, result: Tensor
) -> None:
    """Fill result, (B, H, Nk), with u A of every head, or with u [A o G]+, G = grad v^T."""
    tiles = stream_tiles(problem, q.dtype, backward=True)
    statistic = q.new_empty((*q.shape[:3], 2), dtype=torch.float32)
    width, value_width = widths(problem)
    meta = (kind, precision(q.dtype), width)
    sizes = (tiles.rows, tiles.keys)
    launch(row_statistic, q, problem.queries, tiles.rows, tiles, problem, statistic, *meta, *sizes)
    grads = None if grad is None else Rows.of(grad)
    operands = (problem, u, grads, statistic, result)
    launch(chain_row, q, problem.keys, tiles.keys, tiles, *operands, *meta, value_width, *sizes)


def launch(kernel, like: Tensor, count: int, size: int, tiles: Tiles, *arguments) -> None:
    """Run one program per tile of ``count`` tokens, for every image and head of ``like``."""
    _run(
        kernel,
        triton.cdiv(count, size) * like.shape[0] * like.shape[1],
        like.device,
        tiles,
        *arguments,
    )


def _run(kernel, programs: int, device: torch.device, tiles: Tiles, *arguments) -> None:
    options = {"num_warps": tiles.warps, "enable_fp_fusion": True}
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        try:
            kernel[(programs,)](*arguments, num_stages=tiles.stages, **options)
        except (
            OutOfResources
        ):  # less shared memory than the largest GPUs have: no loads ahead of their use
            kernel[(programs,)](*arguments, num_stages=1, **options)


def precision(dtype: torch.dtype) -> str:
    """Return how tensor cores multiply float32: by three products in tf32, or by one where torch was told so."""
    exact = torch.backends.cuda.matmul.fp32_precision != "tf32"
    if dtype != torch.float32:
        return "ieee"
    return "tf32x3" if exact else "tf32"


def widths(problem: Problem) -> tuple[int, int]:
    """Return the widths of keys and values as powers of two, 16 at least."""
    return tuple(
        max(16, triton.next_power_of_2(width)) for width in (problem.width, problem.value_width)
    )


def _row_bytes(problem: Problem, dtype: torch.dtype) -> int:
    """Return the bytes of a token's widest row; float32 counts twice, as its products keep two parts of it."""
    return max(widths(problem)) * (8 if dtype == torch.float32 else dtype.itemsize)


def stream_tiles(problem: Problem, dtype: torch.dtype, *, backward: bool = False) -> Tiles:
    """Choose tiles by the bytes of a token's widest row, so that all of them fit into shared memory."""
    size = _row_bytes(problem, dtype)
    if size <= 128:
        tiles = Tiles(64, 64, 4, 2) if backward else Tiles(128, 64, 4, 3)
    elif size <= 256:
        tiles = Tiles(64, 64, 8, 2) if backward else Tiles(64, 64, 4, 2)
    elif size <= 512:
        tiles = Tiles(32, 32, 4, 1) if backward else Tiles(64, 32, 4, 2)
    else:
        tiles = Tiles(16, 16, 4, 1) if backward else Tiles(32, 32, 4, 1)
    return tiles._replace(
        rows=_fit(tiles.rows, problem.queries), keys=_fit(tiles.keys, problem.keys)
    )


def _on_chip_tiles(problem: Problem, dtype: torch.dtype) -> Tiles:
    """Choose how many whole rows of scores fit into the registers of a program, as the compiler counts them."""
    size = _row_bytes(problem, dtype)
    if size > 256 or any(x is not None and x.row is not None for x in (problem.bias, problem.mask)):
        tiles = Tiles(32, 64, 4, 1) if problem.keys <= 256 else Tiles(16, 64, 8, 1)
    else:
        keys = min(128 if problem.keys <= 640 else 256, 32768 // size)
        tiles = Tiles(64, keys, 4, 1) if problem.keys <= 256 else Tiles(32, keys, 8, 1)
    return tiles._replace(
        rows=_fit(tiles.rows, problem.queries), keys=_fit(tiles.keys, problem.keys)
    )


def _fit(size: int, count: int) -> int:
    """Return a tile no larger than needed, 16 at least."""
    return min(size, max(16, triton.next_power_of_2(count)))
