"""Pooling that exports with any H and W, is deterministic on CUDA, and is cheap in both directions."""

import torch
from torch import Tensor


def wide(x: Tensor) -> torch.dtype:
    """The type in which sums of x are safe: its own, but float32 for the half types."""
    return torch.promote_types(x.dtype, torch.float32)


class _Maximum(torch.autograd.Function):
    """amax with its own gradient, shared evenly between equal maxima, in a third of the passes."""

    @staticmethod
    def forward(x: Tensor, axes: tuple[int, ...]) -> Tensor:
        return _highest(x, axes)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.save_for_backward(inputs[0], output)
        ctx.axes = inputs[1]

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        x, maximum = ctx.saved_tensors
        if torch.is_grad_enabled():  # a second derivative is wanted
            hits = (x >= maximum).to(x.dtype)
            return hits * (gradient / hits.sum(ctx.axes, keepdim=True)), None
        # A comparison written as numbers is vectorized; one written as booleans is not.
        hits = torch.ge(x, maximum, out=torch.empty_like(x))
        return hits.mul_(gradient / hits.sum(ctx.axes, keepdim=True)), None


def axis_max(x: Tensor, axis: int | tuple[int, ...]) -> Tensor:
    """The maximum over one axis or several, which stay with size one."""
    axes = (axis,) if isinstance(axis, int) else axis
    if torch.compiler.is_compiling():
        return x.amax(axes, keepdim=True)
    return _Maximum.apply(x, axes) if torch.is_grad_enabled() and x.requires_grad else _highest(x, axes)


def _highest(x: Tensor, axes: tuple[int, ...]) -> Tensor:
    """amax; along rows or columns on a CPU by comparing halves, which is vectorized where amax is not."""
    if not x.is_cpu or axes not in ((2,), (3,)) or x.size(axes[0]) == 1:
        return x.amax(axes, keepdim=True)
    while (size := x.size(axes[0])) > 1:
        half = (size + 1) // 2  # the halves of an odd size share one entry
        x = torch.maximum(x.narrow(axes[0], 0, half), x.narrow(axes[0], size - half, half))
    return x


def global_max(x: Tensor) -> Tensor:
    """The maximum over H and W, (B, C, H, W) -> (B, C)."""
    return axis_max(x, (2, 3))[:, :, 0, 0]


def channel_max(x: Tensor) -> Tensor:
    """The maximum over the channels, (B, C, H, W) -> (B, 1, H, W)."""
    return axis_max(x, 1)


def axis_mean(x: Tensor, axis: int | tuple[int, ...], *, dtype: torch.dtype | None = None) -> Tensor:
    """The mean over one axis or several, which stay with size one."""
    # As a sum, because its gradient is a view; that of torch.mean is a division of the full size.
    total, count = x.sum(axis, keepdim=True, dtype=wide(x)), 1
    for each in (axis,) if isinstance(axis, int) else axis:
        count = count * x.size(each)
    return (total / count).to(x.dtype if dtype is None else dtype)


def global_mean(x: Tensor, *, dtype: torch.dtype | None = None) -> Tensor:
    """The mean over H and W, (B, C, H, W) -> (B, C)."""
    return axis_mean(x, (2, 3), dtype=dtype)[:, :, 0, 0]


def global_mean_std(x: Tensor, *, eps: float = 1e-5, unbiased: bool = False) -> tuple[Tensor, Tensor]:
    """Mean and sqrt(variance + eps) over H and W, (B, C, H, W) -> twice (B, C), at least in float32."""
    mean = global_mean(x, dtype=wide(x))
    # The norm of the centered map is exact where E[x^2] - E[x]^2 cancels, and much faster than torch.var here.
    norm = torch.linalg.vector_norm(x - mean[:, :, None, None], dim=(2, 3))
    count = x.size(2) * x.size(3) - unbiased
    return mean, (norm * norm / count + eps).sqrt()


def interval_means(size: int, bins: int, like: Tensor) -> Tensor:
    """The matrix (bins, size) of adaptive pooling: row i averages floor(i size / bins) to ceil((i + 1) size / bins)."""
    position = torch.arange(size, device=like.device)
    bin_ = torch.arange(bins, device=like.device)[:, None]
    start, stop = bin_ * size // bins, -(-(bin_ + 1) * size // bins)
    inside = (start <= position) & (position < stop)
    return inside.to(like.dtype) / (stop - start)
