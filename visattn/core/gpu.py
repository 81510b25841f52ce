"""The fused GPU kernels as an evaluation: what they serve, and on which tensors."""

import warnings

import torch
from torch import Tensor

from visattn.core.call import Call, check, inner_form, name_of
from visattn.core.kernels.triton import ops
from visattn.core.kernels.triton.device import unavailable
from visattn.core.normalize.definition import Normalizer
from visattn.core.similarity.definition import Similarity

HEAD_DIM = 128


def missing(call: Call, kinds: tuple[str, ...] = ops.KINDS) -> str | None:
    """Return why there is no fused GPU kernel for a pair, on any machine."""
    if call.normalize.kernel in kinds and call.similarity.has_dot_form:
        return None
    return (
        f"there is no fused GPU kernel for {name_of(call.similarity)} x {name_of(call.normalize)}"
    )


def refuses(call: Call, kinds: tuple[str, ...] = ops.KINDS) -> str | None:
    """Return why the kernels cannot serve a call; None where they can."""
    return missing(call, kinds) or _beyond(call) or unavailable(call.q.device)


def _beyond(call: Call) -> str | None:
    """Return what in a call is beyond the fused GPU kernels."""
    width = max(x.shape[3] for x in (call.q, call.shared_k, call.shared_v) if x is not None)
    if call.dropout:
        return "dropout of the weights is left to tiles"
    if width > HEAD_DIM:
        return f"it takes heads up to {HEAD_DIM} wide; got {width}"
    return None if call.q.dtype != torch.float64 else "it has no float64"


def warn_of_tiles(call: Call) -> None:
    """Say on CUDA, once, why a fused kernel that exists is not taken."""
    if not call.q.is_cuda or torch.compiler.is_compiling() or missing(call) or _beyond(call):
        return
    why = unavailable(call.q.device)
    if why is not None:
        warnings.warn(f"query tiles are taken in place of the fused kernels: {why}", stacklevel=2)


def evaluated(call: Call) -> Tensor:
    """Return m."""
    q, k, bias, scale = inner_form(call)
    return ops.fused(
        q,
        k,
        call.shared_v,
        bias,
        call.mask,
        call.normalize.exponent(),
        call.normalize.kernel,
        scale,
    )


def row_chain(
    u: Tensor,
    q: Tensor,
    k: Tensor,
    pair: tuple[Similarity | None, Normalizer | None] = (None, None),
    *,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    scale: float | None = None,
    weighed: tuple[Tensor, Tensor] | None = None,
) -> Tensor | None:
    """Return u A of every head, (B, H, Nk), by a fused GPU kernel; None where none serves the call.

    Args:
        u: (B, Nq), one row for all heads.
        q: As in ``attend``, like k, bias and mask.
        pair: The similarity and the normalizer, None standing for a scaled dot product and for
            softmax.
        scale: Factor of a scaled dot product where it is not 1 / sqrt(D).
        weighed: Gradients (B, H, Nq, Dv) and values (B, H, Nk, Dv), to weigh A by [G]+, G =
            gradients values^T.
    """
    if unavailable(q.device) or (
        torch.is_grad_enabled() and any(x.requires_grad for x in (u, q, k))
    ):
        return None
    call = check(q, k, None, *pair, bias, mask, 0.0)
    if refuses(call, (*ops.KINDS, "softmax")):
        return None
    q, k, bias, own = inner_form(call)
    dtype, p = torch.promote_types(q.dtype, k.dtype), call.normalize.exponent()
    p = None if p is None else p.float()
    gradient, v = (None, None) if weighed is None else (x.to(dtype) for x in weighed)
    operands = (u.float(), q.to(dtype), k.to(dtype), bias, call.mask, p)
    return ops.row_chain(
        *operands, call.normalize.kernel, own if scale is None else scale, gradient, v
    )
