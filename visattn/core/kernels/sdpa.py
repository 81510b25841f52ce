"""The fused evaluation: pairs rewritten, exactly, for scaled_dot_product_attention.

On a CPU torch silently leaves its fused kernel, and forms an N x N matrix, for a bias that requires
grad, a 3-D mask, values whose width is not that of the keys, rows that are not contiguous, 5-D
input and dropout. Here widths are padded, rows copied, biases stay 4-D, and a bias that requires
grad runs through a custom op.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_TILE_ROWS = 256


def merge(bias: Tensor | None, mask: Tensor | None) -> Tensor | None:
    """Return one additive bias, or the mask itself where there is no bias."""
    if bias is None:
        return mask
    if mask is None:
        return bias
    return bias.masked_fill(~mask, -torch.inf)


def extend(
    x: Tensor | None,
    keys: int,
    value: float,
) -> Tensor | None:
    """Append one key to a bias or mask over ``keys`` keys."""
    if x is None:
        return None
    x = x.expand(*x.shape[:3], keys)
    return F.pad(x, (0, 1), value=value)  # (B, H, Nq, keys + 1)


def fused(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    dropout: float,
    scale: float | None,
) -> Tensor:
    """Return softmax(scale q k^T + bias) v through the fused kernel; scale None is 1 / sqrt(D)."""
    if scale is None:
        scale = q.shape[-1] ** -0.5
    value_width = v.shape[-1]
    width = max(q.shape[-1], value_width)
    q = _dense_rows(_pad(q, width))
    k = _dense_rows(_pad(k, width))
    v = _dense_rows(_pad(v, width))
    bias = merge(bias, mask)
    if bias is not None and bias.dtype != torch.bool:
        bias = bias.to(q.dtype)
    if bias is not None and not dropout and _needs_own_gradient(bias):
        m = _biased(q, k, v, bias, scale)[0]
    else:
        m = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout, scale=scale)
    return m[..., :value_width]


def _needs_own_gradient(bias: Tensor) -> bool:
    """Whether torch would leave its CPU kernel for the gradient of a bias."""
    return bias.requires_grad and torch.is_grad_enabled() and bias.device.type == "cpu"


def _pad(x: Tensor, width: int) -> Tensor:
    """Append channels of zeros up to ``width``."""
    if x.shape[-1] == width:
        return x
    return F.pad(x, (0, width - x.shape[-1]))


def _dense_rows(x: Tensor) -> Tensor:
    """Return ``x`` with channels side by side in memory."""
    if x.stride(-1) == 1:
        return x
    return x.contiguous()


@torch.library.custom_op("visattn::biased_sdpa", mutates_args=())
def _biased(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Return m and the log sum exp of every row, (B, H, Nq)."""
    forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    # Outputs of a custom op must be dense, as the fake ones are.
    m, lse = forward(q, k, v, attn_mask=bias, scale=scale)
    return m.contiguous(), lse.contiguous()


@_biased.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor]:
    m = q.new_empty((*q.shape[:3], v.shape[3]))
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return m, q.new_empty(q.shape[:3], dtype=dtype)


@torch.library.custom_op("visattn::biased_sdpa_backward", mutates_args=())
def _biased_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor,
    m: Tensor,
    lse: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return dq, dk, dv and dbias; torch's kernel gives all but the last."""
    backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    dq, dk, dv = backward(grad, q, k, v, m, lse, 0.0, False, attn_mask=bias, scale=scale)
    dbias = torch.zeros(bias.shape, dtype=lse.dtype)
    # sum over keys of alpha * d alpha, without the matrix: (B, H, Nq, 1)
    delta = (grad * m).sum(-1, keepdim=True, dtype=lse.dtype)
    # A query without any key has no log sum exp; exp(-inf - 0) gives it zero weights.
    origin = lse[..., None]  # (B, H, Nq, 1)
    for start in range(0, q.shape[2], _TILE_ROWS):
        rows = slice(start, start + _TILE_ROWS)
        # (B, H, rows, Nk)
        e = (q[:, :, rows] @ k.transpose(2, 3)).to(lse.dtype)
        e.mul_(scale).add_(_cut_rows(bias, rows))
        row_origin = origin[:, :, rows]
        # Recompute the weights of these rows from the saved log sum exp.
        alpha = e.sub_(row_origin.masked_fill(row_origin == -torch.inf, 0)).exp_()
        de = (grad[:, :, rows] @ v.transpose(2, 3)).to(lse.dtype)
        de.sub_(delta[:, :, rows]).mul_(alpha)
        target = _cut_rows(dbias, rows)
        # Sum over the axes that the bias shares.
        target += de.sum_to_size(target.shape)
    return dq.contiguous(), dk.contiguous(), dv.contiguous(), dbias.to(bias.dtype)


def _cut_rows(bias: Tensor, rows: slice) -> Tensor:
    """Cut query rows from a bias (B, H, Nq or 1, Nk)."""
    if bias.shape[2] == 1:
        return bias
    return bias[:, :, rows]


@_biased_backward.register_fake
def _(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor,
    m: Tensor,
    lse: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dq = torch.empty_like(q, memory_format=torch.contiguous_format)
    dk = torch.empty_like(k, memory_format=torch.contiguous_format)
    dv = torch.empty_like(v, memory_format=torch.contiguous_format)
    dbias = torch.empty_like(bias, memory_format=torch.contiguous_format)
    return dq, dk, dv, dbias


def _setup_context(
    ctx: Any,
    inputs: Sequence[Any],
    output: tuple[Tensor, Tensor],
) -> None:
    q, k, v, bias, scale = inputs
    m, lse = output
    ctx.save_for_backward(q, k, v, bias, m, lse)
    ctx.scale = scale
    ctx.mark_non_differentiable(lse)


def _vjp(
    ctx: Any,
    grad: Tensor,
    _: Tensor,
) -> tuple[Tensor | None, ...]:
    return (*_biased_backward(grad, *ctx.saved_tensors, ctx.scale), None)


_biased.register_autograd(_vjp, setup_context=_setup_context)
