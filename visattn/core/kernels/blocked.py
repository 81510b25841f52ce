"""The tiled evaluation of any row-local pair with an inner-product form.

It takes O(N x tile) memory, forward and backward: the scores are computed one tile at a time and
recomputed in the backward pass; only one statistic per row is saved. Two custom ops let
torch.compile pass over them.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from visattn.core.kernels.rows import ROW_STATISTICS, RowStatistics, entmax_exponent_grad
from visattn.core.kernels.tiles import Tile, cut, tiles

_TILE_BYTES = 1024 * 1024


def _matmul(x: Tensor, y: Tensor) -> Tensor:
    """Return the batched product of 4-D tiles.

    It runs where autocast is disabled, which must not round what is accumulated.
    """
    shape = (*x.shape[:-1], y.shape[-1])
    # (B, H, M, K) and (B, H, K, N) -> (B * H, M, N)
    flat_x = x.reshape(-1, *x.shape[2:])
    flat_y = y.reshape(-1, *y.shape[2:])
    return torch.bmm(flat_x, flat_y).view(shape)


class _Problem(NamedTuple):
    """What forward and backward share; tensors have the dtype of accumulation."""

    q: Tensor
    k: Tensor
    v: Tensor
    bias: Tensor | None
    mask: Tensor | None
    row: RowStatistics
    p: Tensor | None

    def tiles(self) -> list[Tile]:
        shape = (*self.q.shape[:3], self.k.shape[2])
        scores = _TILE_BYTES // self.q.element_size()
        return list(tiles(shape, scores))

    def exponent(self, tile: Tile) -> Tensor | float:
        """Return p of the tile's heads, (1, heads, 1, 1)."""
        if self.p is None:
            return 0.0
        return self.p.view(1, -1, 1, 1)[:, tile.heads]

    def scores(self, tile: Tile) -> tuple[Tensor, Tensor | int]:
        """Return the scores of a tile and the number of keys per row.

        Scores are -inf where a key may not be attended.
        """
        q = self.q[tile]
        k = self.k[tile.batch, tile.heads]
        e = _matmul(q, k.transpose(2, 3))  # (batch, heads, rows, Nk)
        if self.bias is None and self.mask is None:
            return e, e.shape[-1]
        if self.bias is not None:
            e += cut(self.bias, tile)
        if self.mask is not None:
            e.masked_fill_(~cut(self.mask, tile), -torch.inf)
        allowed = e > -torch.inf
        return e, allowed.sum(-1, keepdim=True, dtype=e.dtype).clamp_(min=1)


def _accumulation(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which scores and sums are computed."""
    if dtype in (torch.float16, torch.bfloat16):
        return torch.float32
    return dtype


def _describe_problem(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    kernel: str,
    p: Tensor | None,
) -> _Problem:
    dtype = _accumulation(q.dtype)
    if bias is not None:
        bias = bias.to(dtype)
    return _Problem(
        q.to(dtype).contiguous(),
        k.to(dtype).contiguous(),
        v.to(dtype).contiguous(),
        bias,
        mask,
        ROW_STATISTICS[kernel],
        p,
    )


@torch.library.custom_op("visattn::blocked", mutates_args=())
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    kernel: str,
    p: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Return m and the statistic of every row, (B, H, Nq, 1)."""
    problem = _describe_problem(q, k, v, bias, mask, kernel, p)
    row = problem.row
    m = problem.q.new_empty((*q.shape[:3], v.shape[3]))
    statistic = problem.q.new_empty((*q.shape[:3], 1))
    with torch.autocast(q.device.type, enabled=False):
        for tile in problem.tiles():
            e, count = problem.scores(tile)
            exponent = problem.exponent(tile)
            # statistic and weights may overwrite e, in this order
            s = row.statistic(e, count, exponent)
            alpha = row.weights(e, s, count, exponent)
            # (.., rows, Nk) x (.., Nk, Dv)
            m[tile] = _matmul(alpha, problem.v[tile.batch, tile.heads])
            statistic[tile] = s
    return m.to(v.dtype), statistic


@_forward.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    kernel: str,
    p: Tensor | None,
) -> tuple[Tensor, Tensor]:
    m = v.new_empty((*q.shape[:3], v.shape[3]))
    statistic = q.new_empty((*q.shape[:3], 1), dtype=_accumulation(q.dtype))
    return m, statistic


@torch.library.custom_op("visattn::blocked_backward", mutates_args=())
def _backward(
    grad: Tensor,
    grad_statistic: Tensor,
    statistic: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    kernel: str,
    p: Tensor | None,
    bias_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return dq, dk, dv, dbias and dp; the last two are empty where nobody asks for them."""
    problem = _describe_problem(q, k, v, bias, mask, kernel, p)
    gradients = _Gradients.zeros(problem, bias_grad)
    grad = grad.to(problem.q.dtype).contiguous()
    lse_grad = None
    if kernel == "softmax":  # the only statistic with a gradient: see row_lse
        lse_grad = grad_statistic.to(problem.q.dtype)
    with torch.autocast(q.device.type, enabled=False):
        for tile in problem.tiles():
            _add_tile(problem, gradients, tile, grad, lse_grad, statistic)
    return (
        gradients.q.to(q.dtype),
        gradients.k.to(k.dtype),
        gradients.v.to(v.dtype),
        gradients.bias,
        gradients.p,
    )


class _Gradients(NamedTuple):
    """The gradients as they accumulate; those of bias and p are empty where nobody asks."""

    q: Tensor
    k: Tensor
    v: Tensor
    bias: Tensor
    p: Tensor

    @classmethod
    def zeros(cls, problem: _Problem, bias_grad: bool) -> "_Gradients":
        # Two empty tensors: outputs of a custom op may not be the same tensor.
        dbias = problem.q.new_empty(0)
        if bias_grad and problem.bias is not None:
            dbias = torch.zeros_like(problem.bias)
        dp = problem.q.new_empty(0)
        if problem.p is not None:
            dp = torch.zeros_like(problem.p, dtype=dp.dtype)
        return cls(
            torch.empty_like(problem.q),  # every tile writes its own rows
            torch.zeros_like(problem.k),
            torch.zeros_like(problem.v),
            dbias,
            dp,
        )


def _add_tile(
    problem: _Problem,
    gradients: _Gradients,
    tile: Tile,
    grad: Tensor,
    lse_grad: Tensor | None,
    statistic: Tensor,
) -> None:
    """Add what one tile of recomputed scores contributes to the gradients."""
    block = (tile.batch, tile.heads)  # all keys of the tile's images and heads
    grad = grad[tile]
    s = statistic[tile]
    exponent = problem.exponent(tile)
    e, count = problem.scores(tile)
    alpha = problem.row.weights(e, s, count, exponent)
    # (.., rows, Dv) x (.., Dv, Nk)
    dalpha = _matmul(grad, problem.v[block].transpose(2, 3))
    gradients.v[block] += _matmul(alpha.transpose(2, 3), grad)
    if problem.p is not None:
        row_grad = entmax_exponent_grad(alpha, dalpha, exponent)
        # (batch, heads, rows, 1) -> (heads,)
        gradients.p[tile.heads] += row_grad.sum((0, 2, 3))
    de = problem.row.vjp(alpha, dalpha, s, count, exponent)
    if lse_grad is not None:
        # d lse / d e = alpha
        de += alpha * lse_grad[tile]
    if problem.mask is not None:
        de.masked_fill_(~cut(problem.mask, tile), 0)
    gradients.q[tile] = _matmul(de, problem.k[block])
    gradients.k[block] += _matmul(de.transpose(2, 3), problem.q[tile])
    if gradients.bias.numel():
        dbias = cut(gradients.bias, tile)
        dbias.add_(de.sum_to_size(dbias.shape))


@_backward.register_fake
def _(
    grad: Tensor,
    grad_statistic: Tensor,
    statistic: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    kernel: str,
    p: Tensor | None,
    bias_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dtype = _accumulation(q.dtype)
    dbias = q.new_empty(0, dtype=dtype)
    if bias_grad and bias is not None:
        dbias = bias.new_empty(bias.shape, dtype=dtype)
    dp = q.new_empty(0, dtype=dtype)
    if p is not None:
        dp = p.new_empty(p.shape, dtype=dtype)
    dq = torch.empty_like(q, memory_format=torch.contiguous_format)
    dk = torch.empty_like(k, memory_format=torch.contiguous_format)
    dv = torch.empty_like(v, memory_format=torch.contiguous_format)
    return dq, dk, dv, dbias, dp


def _refuse_second_derivative(ctx: Any, *grads: Tensor) -> None:
    raise RuntimeError("query tiles have no second derivative; call attend(..., impl='dense')")


_backward.register_autograd(_refuse_second_derivative)


def _setup_context(
    ctx: Any,
    inputs: Sequence[Any],
    output: tuple[Tensor, Tensor],
) -> None:
    q, k, v, bias, mask, kernel, p = inputs
    _, statistic = output
    ctx.save_for_backward(statistic, q, k, v, bias, mask, p)
    ctx.kernel = kernel


def _vjp(
    ctx: Any,
    grad: Tensor,
    grad_statistic: Tensor,
) -> tuple[Tensor | None, ...]:
    statistic, q, k, v, bias, mask, p = ctx.saved_tensors
    bias_grad = bias is not None and ctx.needs_input_grad[3]
    dq, dk, dv, dbias, dp = _backward(
        grad, grad_statistic, statistic, q, k, v, bias, mask, ctx.kernel, p, bias_grad
    )
    if bias_grad:
        dbias = dbias.to(bias.dtype)
    else:
        dbias = None
    if p is None:
        dp = None
    else:
        dp = (-dp / (p * p)).to(p.dtype)  # a = 1 + 1 / p, so that da/dp = -1 / p^2
    return dq, dk, dv, dbias, None, None, dp


_forward.register_autograd(_vjp, setup_context=_setup_context)


def blocked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    kernel: str,
    p: Tensor | None = None,
) -> Tensor:
    """Return m for scores q k^T + bias.

    Args:
        q: (B, H, Nq, D).
        k: (B, H, Nk, D), as many heads as ``q``.
        v: (B, H, Nk, Dv).
        bias: 4-D, broadcastable to (B, H, Nq, Nk), or None.
        mask: Likewise; True may attend.
        kernel: Name of the row functions in ``ROW_STATISTICS``.
        p: 1 / (alpha - 1) of every head, for entmax.
    """
    return _forward(q, k, v, bias, mask, kernel, p)[0]


def row_lse(
    q: Tensor,
    k: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
) -> Tensor:
    """Return log sum exp over the keys of q k^T + bias, (B, H, Nq, 1).

    It has a gradient and forms no N x N matrix.
    """
    if torch.compiler.is_exporting():  # an exported file cannot hold a custom op
        return _dense_row_lse(q, k, bias, mask)
    return _forward(q, k, k[..., :1], bias, mask, "softmax", None)[1]


def _dense_row_lse(
    q: Tensor,
    k: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
) -> Tensor:
    dtype = _accumulation(q.dtype)
    e = q.to(dtype) @ k.to(dtype).transpose(2, 3)
    if bias is not None:
        e = e + bias
    if mask is not None:
        e = e.masked_fill(~mask, -torch.inf)
    return torch.logsumexp(e, -1, keepdim=True)
