"""The fused kernels as custom ops with fake kernels and autograd.

torch.compile passes over them. Triton is imported when an op runs. An op's last arguments are part
of its schema: there ``kind`` is the kernel's name.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

KERNELS = ("sigmoid", "relu", "sparsemax", "entmax15", "entmax")
"""Normalizers that have a fused kernel, by the name a normalizer gives as its ``kernel``."""


def _empty_by_token(
    x: Tensor,
    heads: int,
    tokens: int,
    width: int,
) -> Tensor:
    """Return an empty (B, heads, tokens, width) laid out as (B, tokens, heads, width).

    The next layer reads it in this order.
    """
    return x.new_empty(x.shape[0], tokens, heads, width).transpose(1, 2)


def _empty_outputs(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Return room for m and for the two numbers of every row."""
    # (B, H, Nq, Dv) and (B, H, Nq, 2)
    m = _empty_by_token(q, q.shape[1], q.shape[2], v.shape[3])
    statistic = q.new_empty((*q.shape[:3], 2), dtype=torch.float32)
    return m, statistic


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

    m, statistic = _empty_outputs(q, v)
    if m.numel():
        q = launch.dense_rows(q)
        k = launch.dense_rows(k)
        v = launch.dense_rows(v)
        problem = launch.describe_problem(q, k, v, bias, mask, p, scale)
        launch.forward(problem, kind, m, statistic)
    return m, statistic


@_forward.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    p: Tensor | None,
    kind: str,
    scale: float,
) -> tuple[Tensor, Tensor]:
    return _empty_outputs(q, v)


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

    dq, dk, dv, dbias, dp = _empty_gradients(q, k, v, bias, p, bias_grad)
    if not grad.numel():
        return dq, dk.zero_(), dv.zero_(), dbias.zero_(), dp.zero_()
    # Every query head writes a gradient of its own; heads that are shared sum them below.
    head_dk = _per_query_head(dk, q.shape[1])
    head_dv = _per_query_head(dv, q.shape[1])
    q = launch.dense_rows(q)
    k = launch.dense_rows(k)
    v = launch.dense_rows(v)
    problem = launch.describe_problem(q, k, v, bias, mask, p, scale)
    grad = launch.dense_rows(grad)
    row_sums, column_sums = _empty_sums(q, k, bias if bias_grad else None)
    exponent_grads = None
    if p is not None:
        exponent_grads = q.new_empty(q.shape[:3], dtype=torch.float32)
    sums = launch.Sums(row_sums, column_sums, exponent_grads)
    delta = launch.backward(problem, kind, grad, statistic, dq, head_dk, head_dv, sums)
    _sum_query_heads(head_dk, dk)
    _sum_query_heads(head_dv, dv)
    if bias is not None and bias_grad:
        if row_sums is not None:
            dbias = row_sums.sum_to_size(bias.shape)
        elif column_sums is not None:
            dbias = column_sums.sum_to_size(bias.shape)
        else:
            dbias = launch.backward_bias(problem, kind, grad, statistic, delta, bias.shape)
    if exponent_grads is not None:
        # (B, H, Nq) -> (H,)
        dp = exponent_grads.sum((0, 2))
    return dq, dk, dv, dbias.contiguous(), dp


def _empty_gradients(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    p: Tensor | None,
    bias_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return room for the gradients; those of bias and p are empty where nobody asks for them."""
    dq = _empty_by_token(q, *q.shape[1:])
    dk = _empty_by_token(k, *k.shape[1:])
    dv = _empty_by_token(v, *v.shape[1:])
    dbias = q.new_empty(0, dtype=torch.float32)
    if bias is not None and bias_grad:
        dbias = q.new_empty(bias.shape, dtype=torch.float32)
    dp = q.new_empty(0, dtype=torch.float32)
    if p is not None:
        dp = q.new_empty(p.shape, dtype=torch.float32)
    return dq, dk, dv, dbias, dp


def _per_query_head(x: Tensor, heads: int) -> Tensor:
    """Return ``x``, or, where query heads share its heads, room for the gradient of each one."""
    if x.shape[1] == heads:
        return x
    return _empty_by_token(x, heads, x.shape[2], x.shape[3])


def _sum_query_heads(head_grads: Tensor, total: Tensor) -> None:
    """Fill ``total`` with the sums of the query heads that share a head; see _per_query_head."""
    if head_grads is total:
        return
    groups = head_grads.unflatten(1, (total.shape[1], -1))  # (B, Hk, H / Hk, Nk, D)
    torch.sum(groups, 2, out=total)


def _empty_sums(
    q: Tensor,
    k: Tensor,
    bias: Tensor | None,
) -> tuple[Tensor | None, Tensor | None]:
    """Return room for row or column sums of the score gradients.

    The gradient of a bias that is the same for all queries or for all keys is such a sum.
    """
    if bias is None:
        return None, None
    if bias.shape[2] == 1:
        return None, _empty_chain(q, k)[:, :, None]  # (B, H, 1, Nk)
    if bias.shape[3] == 1:
        row_sums = q.new_empty((*q.shape[:3], 1), dtype=torch.float32)
        return row_sums, None
    return None, None


@_backward.register_fake
def _(
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
    return _empty_gradients(q, k, v, bias, p, bias_grad)


def _refuse_second_derivative(ctx: Any, *grads: Tensor) -> None:
    raise RuntimeError(
        "the fused kernels have no second derivative; call attend(..., impl='dense')"
    )


_backward.register_autograd(_refuse_second_derivative)


def _setup_context(
    ctx: Any,
    inputs: Sequence[Any],
    output: tuple[Tensor, Tensor],
) -> None:
    q, k, v, bias, mask, p, kernel, scale = inputs
    _, statistic = output
    ctx.save_for_backward(statistic, q, k, v, bias, mask, p)
    ctx.kernel = kernel
    ctx.scale = scale
    ctx.mark_non_differentiable(statistic)


def _vjp(
    ctx: Any,
    grad: Tensor,
    _: Tensor,
) -> tuple[Tensor | None, ...]:
    statistic, q, k, v, bias, mask, p = ctx.saved_tensors
    bias_grad = bias is not None and ctx.needs_input_grad[3]
    dq, dk, dv, dbias, dp = _backward(
        grad, statistic, q, k, v, bias, mask, p, ctx.kernel, ctx.scale, bias_grad
    )
    if bias_grad:
        dbias = dbias.to(bias.dtype)
    else:
        dbias = None
    if p is None:
        dp = None
    else:
        dp = (-dp / (p * p)).to(p.dtype)  # a = 1 + 1 / p, so that da/dp = -1 / p^2
    return dq, dk, dv, dbias, None, dp, None, None


_forward.register_autograd(_vjp, setup_context=_setup_context)


def fused(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    p: Tensor | None,
    kernel: str,
    scale: float = 1.0,
) -> Tensor:
    """Return m for scores scale q k^T + bias and a normalizer of KERNELS.

    Args:
        q: (B, H, Nq, D).
        k: (B, Hk, Nk, D); H is a multiple of Hk.
        v: (B, Hk, Nk, Dv).
        bias: 4-D, broadcastable to (B, H, Nq, Nk), or None.
        mask: Likewise; True may attend.
        p: 1 / (alpha - 1) of every head, for entmax.
        kernel: One of KERNELS.
        scale: Factor of the inner products.
    """
    dtype = torch.promote_types(q.dtype, k.dtype)
    dtype = torch.promote_types(dtype, v.dtype)
    if p is not None:
        p = p.float()
    q = q.to(dtype)
    k = k.to(dtype)
    v = v.to(dtype)
    return _forward(q, k, v, bias, mask, p, kernel, scale)[0]


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
    """Return u A of every head, or, with ``grad`` and ``v``, u [A o (grad v^T)]+; no gradient.

    Args:
        u: (B, Nq), float32.
        q: (B, H, Nq, D).
        k: (B, Hk, Nk, D).
        bias: As in :func:`fused`.
        mask: As in :func:`fused`.
        p: As in :func:`fused`.
        kind: One of KERNELS, or softmax.
        scale: Factor of the inner products.
        grad: (B, H, Nq, Dv), or None.
        v: (B, Hk, Nk, Dv), or None.

    Returns:
        (B, H, Nk), float32.
    """
    from visattn.core.kernels.triton import launch

    result = _empty_chain(q, k)
    if q.numel() and result.numel():
        q = launch.dense_rows(q)
        k = launch.dense_rows(k)
        if v is not None:
            v = launch.dense_rows(v)
        if grad is not None:
            grad = launch.dense_rows(grad)
        problem = launch.describe_problem(q, k, v, bias, mask, p, scale)
        launch.row_chain(problem, kind, u.contiguous(), grad, q, result)
    return result


def _empty_chain(q: Tensor, k: Tensor) -> Tensor:
    return q.new_empty((*q.shape[:2], k.shape[2]), dtype=torch.float32)


@row_chain.register_fake
def _(
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
    return _empty_chain(q, k)
