"""The fused GPU kernels as an evaluation: what they serve, and on which tensors."""

import warnings

import torch
from torch import Tensor

from visattn.core.call import AttendCall, check_call, inner_form, name_of
from visattn.core.kernels.triton import ops
from visattn.core.kernels.triton.device import unavailable
from visattn.core.normalize.definition import Normalizer
from visattn.core.similarity.definition import Similarity

HEAD_DIM = 128  # widest head that the kernels take


def missing_kernel(call: AttendCall, kernels: tuple[str, ...] = ops.KERNELS) -> str | None:
    """Return why there is no fused GPU kernel for a pair, on any machine."""
    if call.normalize.kernel in kernels and call.similarity.has_dot_form:
        return None
    return (
        f"there is no fused GPU kernel for {name_of(call.similarity)} x {name_of(call.normalize)}"
    )


def refuses(call: AttendCall, kernels: tuple[str, ...] = ops.KERNELS) -> str | None:
    """Return why the kernels cannot serve a call; None where they can."""
    return missing_kernel(call, kernels) or _beyond(call) or unavailable(call.q.device)


def _beyond(call: AttendCall) -> str | None:
    """Return what in a call is beyond the fused GPU kernels."""
    tensors = (call.q, call.shared_k, call.shared_v)
    width = max(x.shape[3] for x in tensors if x is not None)
    if call.dropout:
        return "dropout of the weights is left to tiles"
    if width > HEAD_DIM:
        return f"it takes heads up to {HEAD_DIM} wide; got {width}"
    if call.q.dtype == torch.float64:
        return "it has no float64"
    return None


def warn_of_tiles(call: AttendCall) -> None:
    """Say on CUDA, once, why a fused kernel that exists is not taken."""
    if not call.q.is_cuda or torch.compiler.is_compiling() or missing_kernel(call) or _beyond(call):
        return
    why = unavailable(call.q.device)
    if why is not None:
        warnings.warn(f"query tiles are used in place of the fused kernels: {why}", stacklevel=2)


def evaluate(call: AttendCall) -> Tensor:
    """Return m."""
    q, k, bias, scale = inner_form(call)
    assert call.shared_v is not None and call.normalize.kernel is not None, "refused otherwise"
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
    needs_gradient = any(x.requires_grad for x in (u, q, k))
    if unavailable(q.device) or (torch.is_grad_enabled() and needs_gradient):
        return None
    call = check_call(q, k, None, *pair, bias, mask, 0.0)
    if refuses(call, (*ops.KERNELS, "softmax")):
        return None
    form = inner_form(call)
    dtype = torch.promote_types(form.q.dtype, form.k.dtype)
    exponent = call.normalize.exponent()
    if exponent is not None:
        exponent = exponent.float()
    gradients = values = None
    if weighed is not None:
        gradients = weighed[0].to(dtype)
        values = weighed[1].to(dtype)
    return ops.row_chain(
        u.float(),
        form.q.to(dtype),
        form.k.to(dtype),
        form.bias,
        call.mask,
        exponent,
        call.normalize.kernel,
        form.scale if scale is None else scale,
        gradients,
        values,
    )
