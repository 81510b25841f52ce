"""The fused kernels as custom ops with fake kernels and autograd, so that torch.compile passes over them."""

import torch
from torch import Tensor

KINDS = ("sigmoid", "relu", "sparsemax", "entmax15", "entmax")
"""Normalizers that have kernels, by the name a normalizer gives as its ``kernel``."""


def _by_token(x: Tensor, tokens: int, width: int, heads: int | None = None) -> Tensor:
    """Return an empty (B, H, tokens, width) whose tokens lie one after the other, as a layer reads them next."""
    return x.new_empty(x.shape[0], tokens, heads or x.shape[1], width).transpose(1, 2)


@torch.library.custom_op("visattn::triton", mutates_args=())
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    p: Tensor | None,
    kind: str,
    scale: float,
) -> tuple[Tensor, Tensor]:
    from visattn.core.kernels.triton import launch

    m = _by_token(q, q.shape[2], v.shape[3])
    statistic = q.new_empty((*q.shape[:3], 2), dtype=torch.float32)
    if m.numel():
        problem = launch.describe_problem(*map(launch.dense_rows, (q, k, v)), bias, mask, p, scale)
        launch.forward(problem, kind, m, statistic)
    return m, statistic


@_forward.register_fake
def _(q, k, v, bias, mask, p, kind, scale):
    return _by_token(q, q.shape[2], v.shape[3]), q.new_empty((*q.shape[:3], 2), dtype=torch.float32)


@torch.library.custom_op("visattn::triton_backward", mutates_args=())
def _backward(
    grad: Tensor,
    statistic: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    p: Tensor | None,
    kind: str,
    scale: float,
    bias_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    from visattn.core.kernels.triton import launch

    dq, dk, dv, dbias, dp = _gradients(q, k, v, bias, p, bias_grad)
    if not grad.numel():
        return dq, dk.zero_(), dv.zero_(), dbias.zero_(), dp.zero_()
    own = [_per_query_head(x, q.shape[1]) for x in (dk, dv)]
    problem = launch.describe_problem(*map(launch.dense_rows, (q, k, v)), bias, mask, p, scale)
    grad = launch.dense_rows(grad)
    row_sums, columns = _sums(q, k, bias if bias_grad else None)
    turns = None if p is None else q.new_empty(q.shape[:3], dtype=torch.float32)
    delta = launch.backward(problem, kind, grad, statistic, (dq, *own), (row_sums, columns, turns))
    for mine, all_heads in zip((dk, dv), own, strict=True):
        if mine is not all_heads:
            torch.sum(all_heads.unflatten(1, (mine.shape[1], -1)), 2, out=mine)
    if row_sums is not None or columns is not None:
        dbias = (columns if row_sums is None else row_sums).sum_to_size(bias.shape)
    elif bias_grad:
        dbias = launch.backward_bias(problem, kind, grad, statistic, delta, bias.shape)
    return dq, dk, dv, dbias.contiguous(), dp if turns is None else turns.sum((0, 2))


def _gradients(q, k, v, bias, p, bias_grad: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return where gradients go; those of bias and p are empty where nobody asks for them."""
    dbias = q.new_empty(bias.shape if bias_grad else 0, dtype=torch.float32)
    dp = q.new_empty(0 if p is None else p.shape, dtype=torch.float32)
    return *(_by_token(x, x.shape[2], x.shape[3]) for x in (q, k, v)), dbias, dp


def _per_query_head(x: Tensor, heads: int) -> Tensor:
    """Return ``x``, or, where query heads share its heads, room for the gradient of each of them."""
    return x if x.shape[1] == heads else _by_token(x, *x.shape[2:], heads)


def _sums(q: Tensor, k: Tensor, bias: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Return where the row or column sums go that make up the gradient of a bias without queries or keys."""
    if bias is None or (bias.shape[2] > 1 and bias.shape[3] > 1):
        return None, None
    shape = (*q.shape[:2], 1, k.shape[2]) if bias.shape[2] == 1 else (*q.shape[:3], 1)
    sums = q.new_empty(shape, dtype=torch.float32)
    return (None, sums) if bias.shape[2] == 1 else (sums, None)


@_backward.register_fake
def _(grad, statistic, q, k, v, bias, mask, p, kind, scale, bias_grad):
    return _gradients(q, k, v, bias, p, bias_grad)


def _refuse(ctx, *grads):
    raise RuntimeError(
        "the fused kernels have no second derivative; call attend(..., impl='dense')"
    )


_backward.register_autograd(_refuse)


def _setup_context(ctx, inputs, output) -> None:
    q, k, v, bias, mask, p, ctx.kind, ctx.scale = inputs
    ctx.save_for_backward(output[1], q, k, v, bias, mask, p)
    ctx.mark_non_differentiable(output[1])


def _vjp(ctx, grad, _):
    bias, p = ctx.saved_tensors[4], ctx.saved_tensors[6]
    bias_grad = bias is not None and ctx.needs_input_grad[3]
    dq, dk, dv, dbias, dp = _backward(grad, *ctx.saved_tensors, ctx.kind, ctx.scale, bias_grad)
    # a = 1 + 1 / p, so that da/dp = -1 / p^2
    dp = None if p is None else (-dp / (p * p)).to(p.dtype)
    return dq, dk, dv, dbias.to(bias.dtype) if bias_grad else None, None, dp, None, None


_forward.register_autograd(_vjp, setup_context=_setup_context)


def fused(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    p: Tensor | None,
    kind: str,
    scale: float = 1.0,
) -> Tensor:
    """Return m for scores scale q k^T + bias and a normalizer of KINDS; all 4-D; query heads may share k and v."""
    dtype = torch.promote_types(torch.promote_types(q.dtype, k.dtype), v.dtype)
    p = None if p is None else p.float()
    return _forward(q.to(dtype), k.to(dtype), v.to(dtype), bias, mask, p, kind, scale)[0]


@torch.library.custom_op("visattn::triton_row_chain", mutates_args=())
def row_chain(
    u: Tensor,
    q: Tensor,
    k: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    p: Tensor | None,
    kind: str,
    scale: float,
    grad: Tensor | None,
    v: Tensor | None,
) -> Tensor:
    """Return u A of every head, (B, H, Nk) in float32, or, with ``grad`` and ``v``, u [A o (grad v^T)]+; no gradient.

    Args:
        u: (B, Nq), float32.
        kind: One of KINDS, or softmax.
    """
    from visattn.core.kernels.triton import launch

    result = q.new_empty((*q.shape[:2], k.shape[2]), dtype=torch.float32)
    if q.numel() and result.numel():
        q, k = launch.dense_rows(q), launch.dense_rows(k)
        v, grad = (None if x is None else launch.dense_rows(x) for x in (v, grad))
        launch.row_chain(
            launch.describe_problem(q, k, v, bias, mask, p, scale),
            kind,
            u.contiguous(),
            grad,
            q,
            result,
        )
    return result


@row_chain.register_fake
def _(u, q, k, bias, mask, p, kind, scale, grad, v):
    return q.new_empty((*q.shape[:2], k.shape[2]), dtype=torch.float32)
