"""The tiled evaluation of any row-local pair with an inner-product form: O(N x tile) memory, forward and backward.

Scores are formed a tile at a time and again in the backward pass; only one statistic per row is
kept. The pair of custom ops lets torch.compile pass over them.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from visattn.core.kernels.rows import ROWS, entmax_exponent_grad
from visattn.core.kernels.tiles import Tile, part, tiles

_TILE_BYTES = 1024 * 1024


def _matmul(x: Tensor, y: Tensor) -> Tensor:
    """Batched product of 4-D tiles; autocast must not round what is accumulated here."""
    shape = (*x.shape[:-1], y.shape[-1])
    return torch.bmm(x.reshape(-1, *x.shape[2:]), y.reshape(-1, *y.shape[2:])).view(shape)


class _Problem(NamedTuple):
    """What forward and backward share: the tensors in the dtype of accumulation and the row functions."""

    q: Tensor
    k: Tensor
    v: Tensor
    bias: Tensor | None
    mask: Tensor | None
    kernel: str
    p: Tensor | None

    def shape(self) -> tuple[int, int, int, int]:
        return (*self.q.shape[:3], self.k.shape[2])

    def exponent(self, tile: Tile) -> Tensor | float:
        return 0.0 if self.p is None else self.p.view(1, -1, 1, 1)[:, tile.heads]

    def scores(self, tile: Tile) -> tuple[Tensor, Tensor | int]:
        """Return the scores of a tile, -inf where a key may not be attended, and the number of keys per row."""
        e = _matmul(
            self.q[tile.batch, tile.heads, tile.rows],
            self.k[tile.batch, tile.heads].transpose(2, 3),
        )
        if self.bias is not None:
            e += part(self.bias, tile)
        if self.mask is not None:
            e.masked_fill_(~part(self.mask, tile), -torch.inf)
        if self.bias is None and self.mask is None:
            return e, e.shape[-1]
        return e, (e > -torch.inf).sum(-1, keepdim=True, dtype=e.dtype).clamp_(min=1)


def _accumulation(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def _problem(q, k, v, bias, mask, kernel, p) -> _Problem:
    dtype = _accumulation(q.dtype)
    q, k, v = (x.to(dtype).contiguous() for x in (q, k, v))
    return _Problem(q, k, v, None if bias is None else bias.to(dtype), mask, kernel, p)


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
    problem, row = _problem(q, k, v, bias, mask, kernel, p), ROWS[kernel]
    m = problem.q.new_empty((*q.shape[:3], v.shape[3]))
    statistic = problem.q.new_empty((*q.shape[:3], 1))
    with torch.autocast(q.device.type, enabled=False):
        for tile in tiles(problem.shape(), _TILE_BYTES // m.element_size()):
            e, count = problem.scores(tile)
            exponent = problem.exponent(tile)
            s = row.statistic(e, count, exponent)
            alpha = row.weights(e, s, count, exponent)
            m[tile] = _matmul(alpha, problem.v[tile.batch, tile.heads])
            statistic[tile] = s
    return m.to(v.dtype), statistic


@_forward.register_fake
def _(q, k, v, bias, mask, kernel, p):
    m = v.new_empty((*q.shape[:3], v.shape[3]))
    return m, q.new_empty((*q.shape[:3], 1), dtype=_accumulation(q.dtype))


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
    problem, row = _problem(q, k, v, bias, mask, kernel, p), ROWS[kernel]
    grad, grad_statistic = grad.to(problem.q.dtype).contiguous(), grad_statistic.to(problem.q.dtype)
    dq, dk, dv = (
        torch.empty_like(problem.q),
        torch.zeros_like(problem.k),
        torch.zeros_like(problem.v),
    )
    dbias = torch.zeros_like(problem.bias) if bias_grad else dq.new_empty(0)
    dp = dq.new_empty(0) if p is None else torch.zeros_like(p, dtype=dq.dtype)
    with torch.autocast(q.device.type, enabled=False):
        for tile in tiles(problem.shape(), _TILE_BYTES // dq.element_size()):
            e, count = problem.scores(tile)
            s, exponent, block = statistic[tile], problem.exponent(tile), (tile.batch, tile.heads)
            alpha = row.weights(e, s, count, exponent)
            dalpha = _matmul(grad[tile], problem.v[block].transpose(2, 3))
            dv[block] += _matmul(alpha.transpose(2, 3), grad[tile])
            if p is not None:
                dp[tile.heads] += entmax_exponent_grad(alpha, dalpha, exponent).sum((0, 2, 3))
            de = row.vjp(alpha, dalpha, s, count, exponent)
            if kernel == "softmax":
                de += alpha * grad_statistic[tile]
            if mask is not None:
                de.masked_fill_(~part(mask, tile), 0)
            dq[tile] = _matmul(de, problem.k[block])
            dk[block] += _matmul(de.transpose(2, 3), problem.q[tile])
            if bias_grad:
                part(dbias, tile).add_(de.sum_to_size(part(dbias, tile).shape))
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), dbias, dp


@_backward.register_fake
def _(grad, grad_statistic, statistic, q, k, v, bias, mask, kernel, p, bias_grad):
    dtype = _accumulation(q.dtype)
    dbias = bias.new_empty(bias.shape, dtype=dtype) if bias_grad else q.new_empty(0, dtype=dtype)
    dp = q.new_empty(0, dtype=dtype) if p is None else p.new_empty(p.shape, dtype=dtype)
    q, k, v = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    return q, k, v, dbias, dp


def _refuse(ctx, *grads):
    raise RuntimeError("query tiles have no second derivative; call attend(..., impl='dense')")


_backward.register_autograd(_refuse)


def _setup_context(ctx, inputs, output) -> None:
    q, k, v, bias, mask, kernel, p = inputs
    ctx.save_for_backward(output[1], q, k, v, bias, mask, p)
    ctx.kernel = kernel


def _vjp(ctx, grad, grad_statistic):
    statistic, q, k, v, bias, mask, p = ctx.saved_tensors
    bias_grad = bias is not None and ctx.needs_input_grad[3]
    dq, dk, dv, dbias, dp = _backward(
        grad, grad_statistic, statistic, q, k, v, bias, mask, ctx.kernel, p, bias_grad
    )
    dbias = dbias.to(bias.dtype) if bias_grad else None
    # a = 1 + 1 / p, so that da/dp = -1 / p^2
    dp = None if p is None else (-dp / (p * p)).to(p.dtype)
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
    """Return m for scores q k^T + bias and the row functions named ``kernel``; all 4-D, as many key as query heads."""
    return _forward(q, k, v, bias, mask, kernel, p)[0]


def row_lse(q: Tensor, k: Tensor, bias: Tensor | None, mask: Tensor | None) -> Tensor:
    """Return log sum exp over the keys of q k^T + bias, (B, H, Nq, 1), with gradient and no N x N matrix."""
    if torch.compiler.is_exporting():  # a custom op has no place in an exported file
        e = q.to(_accumulation(q.dtype)) @ k.to(_accumulation(q.dtype)).transpose(2, 3)
        e = e if bias is None else e + bias
        return torch.logsumexp(
            e if mask is None else e.masked_fill(~mask, -torch.inf), -1, keepdim=True
        )
    return _forward(q, k, k[..., :1], bias, mask, "softmax", None)[1]
