"""The fused GPU kernels as an evaluation: what they serve, and on which tensors."""

import warnings

import torch
from torch import Tensor

from visattn.core.call import Call, inner_form, name_of
from visattn.core.kernels.triton import ops
from visattn.core.kernels.triton.device import unavailable

HEAD_DIM = 128


def missing(call: Call, kinds: tuple[str, ...] = ops.KINDS) -> str | None:
    """Return why there is no fused GPU kernel for a pair, on any machine."""
    if call.normalize.kernel in kinds and call.has_dot_form():
        return None
    return f"there is no fused GPU kernel for {name_of(call.similarity)} x {name_of(call.normalize)}"


def refuses(call: Call, kinds: tuple[str, ...] = ops.KINDS) -> str | None:
    """Return why the kernels cannot serve a call; None where they can."""
    return missing(call, kinds) or _beyond(call) or unavailable(call.q.device)


def _beyond(call: Call) -> str | None:
    """Return what in a call is beyond the fused GPU kernels."""
    width = max(x.shape[3] for x in (call.q, call.k, call.v) if x is not None)
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
    return ops.fused(q, k, call.v, bias, call.mask, call.normalize.exponent(), call.normalize.kernel, scale)


def row_chain(call: Call, u: Tensor, factor: float = 1.0) -> Tensor | None:
    """Return u A of every head, (B, H, Nk), by a fused GPU kernel; None where none serves the call.

    Args:
        u: (B, Nq), one row for all heads.
        factor: Number by which the scores of a scaled dot product are multiplied beforehand.
    """
    if refuses(call, (*ops.KINDS, "softmax")):
        return None
    q, k, bias, scale = inner_form(call)
    dtype, p = torch.promote_types(q.dtype, k.dtype), call.normalize.exponent()
    p = None if p is None else p.float()
    parts = (u.float(), q.to(dtype), k.to(dtype), bias, call.mask, p, call.normalize.kernel, factor * scale)
    return ops.row_chain(*parts, None, None)
