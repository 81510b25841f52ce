"""The fused evaluation: pairs rewritten, exactly, for scaled_dot_product_attention, and its silent traps avoided.

On a CPU the fused kernel is left silently, with an N x N matrix, for a bias that requires grad, a
3-D mask, values of another width than the keys, rows that are not contiguous, 5-D input and
dropout. Here widths are padded, rows copied, biases stay 4-D, and a bias that requires grad runs
through an op of its own.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

_ROWS = 256


def merge(bias: Tensor | None, mask: Tensor | None) -> Tensor | None:
    """Return one additive bias, or the mask itself where there is no bias."""
    if bias is None or mask is None:
        return mask if bias is None else bias
    return bias.masked_fill(~mask, -torch.inf)


def extend(x: Tensor | None, keys: int, value: float) -> Tensor | None:
    """Append one key to a bias or mask over so many keys."""
    return None if x is None else F.pad(x.expand(*x.shape[:3], keys), (0, 1), value=value)


def _pad(x: Tensor, width: int) -> Tensor:
    return x if x.shape[-1] == width else F.pad(x, (0, width - x.shape[-1]))


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
    width, wanted = v.shape[-1], max(q.shape[-1], v.shape[-1])
    if scale is None:
        scale = q.shape[-1] ** -0.5
    q, k, v = (_dense_rows(_pad(x, wanted)) for x in (q, k, v))
    bias = merge(bias, mask)
    if bias is not None and bias.dtype != torch.bool:
        bias = bias.to(q.dtype)
    learned = bias is not None and bias.requires_grad and torch.is_grad_enabled()
    if learned and q.device.type == "cpu" and not dropout:
        m = _biased(q, k, v, bias, scale)[0]
    else:
        m = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout, scale=scale)
    return m[..., :width]


def _dense_rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


@torch.library.custom_op("visattn::biased_sdpa", mutates_args=())
def _biased(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    m, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, attn_mask=bias, scale=scale
    )
    return m.contiguous(), lse.contiguous()


@_biased.register_fake
def _(q, k, v, bias, scale):
    lse = q.new_empty(
        q.shape[:3], dtype=torch.float64 if q.dtype == torch.float64 else torch.float32
    )
    return q.new_empty((*q.shape[:3], v.shape[3])), lse


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
    backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    dq, dk, dv = backward(grad, q, k, v, m, lse, 0.0, False, attn_mask=bias, scale=scale)
    dbias = torch.zeros(bias.shape, dtype=lse.dtype)
    delta = (grad * m).sum(-1, keepdim=True, dtype=lse.dtype)
    for start in range(0, q.shape[2], _ROWS):
        rows = slice(start, start + _ROWS)
        part = bias if bias.shape[2] == 1 else bias[:, :, rows]
        e = (q[:, :, rows] @ k.transpose(2, 3)).to(lse.dtype).mul_(scale).add_(part)
        alpha = e.sub_(
            lse[:, :, rows, None].masked_fill(lse[:, :, rows, None] == -torch.inf, 0)
        ).exp_()
        de = (
            (grad[:, :, rows] @ v.transpose(2, 3)).to(lse.dtype).sub_(delta[:, :, rows]).mul_(alpha)
        )
        target = dbias if bias.shape[2] == 1 else dbias[:, :, rows]
        target += de.sum_to_size(target.shape)
    return dq.contiguous(), dk.contiguous(), dv.contiguous(), dbias.to(bias.dtype)


@_biased_backward.register_fake
def _(grad, q, k, v, bias, m, lse, scale):
    q, k, v, bias = (
        torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v, bias)
    )
    return q, k, v, bias


def _setup_context(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:4], *output)
    ctx.scale = inputs[4]
    ctx.mark_non_differentiable(output[1])


def _vjp(ctx, grad, _):
    return (*_biased_backward(grad, *ctx.saved_tensors, ctx.scale), None)


_biased.register_autograd(_vjp, setup_context=_setup_context)
