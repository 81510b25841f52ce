"""Pooling that exports with any H and W, is deterministic on CUDA, and is cheap in both directions."""

import torch
from torch import Tensor

from visattn.blocks.parts.products import pieces, plain


def wide(x: Tensor) -> torch.dtype:
    """The type in which sums of x are safe: its own, but float32 for the half types."""
    return torch.promote_types(x.dtype, torch.float32)


class _MaxAndMean(torch.autograd.Function):
    """Maxima and means over some axes and over others; equal maxima share the gradient evenly, as for amax."""

    @staticmethod
    def forward(x: Tensor, *axes: tuple[int, ...]) -> tuple[Tensor, ...]:
        return tuple(pooled for axis in axes for pooled in (_highest(x, axis), axis_mean(x, axis)))

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.save_for_backward(inputs[0], *output[::2])
        ctx.axes = inputs[1:]

    @staticmethod
    def backward(ctx, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, *highest = ctx.saved_tensors
        means = [g / _count(x, axis) for g, axis in zip(gradients[1::2], ctx.axes, strict=True)]
        if not torch.is_grad_enabled():
            return _spread(x, ctx.axes, highest, gradients[::2], means), *(None for _ in ctx.axes)
        total = torch.zeros_like(x)  # a second derivative is wanted
        for axis, maximum, gradient, mean in zip(
            ctx.axes, highest, gradients[::2], means, strict=True
        ):
            hits = (x >= maximum).to(x.dtype)
            total = total + hits * (gradient / hits.sum(axis, keepdim=True)) + mean
        return total, *(None for _ in ctx.axes)


def _spread(
    x: Tensor, axes: tuple, highest: list[Tensor], peaks: tuple[Tensor, ...], means: list[Tensor]
) -> Tensor:
    """The gradient of maxima and means, by pieces that stay in the cache."""
    result, count = torch.empty_like(x), pieces(x)
    near = torch.empty_like(x[:count])
    for total, z, *parts in zip(
        *(t.split(count) for t in (result, x, *highest, *peaks, *means)), strict=True
    ):
        n = len(axes)
        for k, (axis, maximum, peak, mean) in enumerate(
            zip(axes, parts[:n], parts[n : 2 * n], parts[2 * n :], strict=True)
        ):
            # A comparison written as numbers is vectorized; one written as booleans is not.
            hits = torch.ge(z, maximum, out=near[: len(z)])
            share = peak / hits.sum(axis, keepdim=True)
            if k == 0:
                torch.addcmul(mean, hits, share, out=total)
            else:
                total.addcmul_(hits, share).add_(mean)
    return result


def _count(x: Tensor, axis: int | tuple[int, ...]) -> int:
    """How many values lie along one axis or several."""
    count = 1
    for each in (axis,) if isinstance(axis, int) else axis:
        count = count * x.size(each)
    return count


def max_and_mean(x: Tensor, *axes: tuple[int, ...]) -> list[tuple[Tensor, Tensor]]:
    """The maximum and the mean of x over each of some sets of axes, which stay with size one."""
    if plain(x) or not (torch.is_grad_enabled() and x.requires_grad) or x.numel() == 0:
        return [(_highest(x, axis), axis_mean(x, axis)) for axis in axes]
    pooled = _MaxAndMean.apply(x, *axes)
    return list(zip(pooled[::2], pooled[1::2], strict=True))


def _highest(x: Tensor, axes: tuple[int, ...]) -> Tensor:
    """amax; along rows or columns on a CPU by comparing halves, which is vectorized where amax is not."""
    if (
        torch.compiler.is_compiling()
        or not x.is_cpu
        or axes not in ((2,), (3,))
        or x.size(axes[0]) == 1
    ):
        return x.amax(axes, keepdim=True)
    while (size := x.size(axes[0])) > 1:
        half = (size + 1) // 2  # the halves of an odd size share one entry
        x = torch.maximum(x.narrow(axes[0], 0, half), x.narrow(axes[0], size - half, half))
    return x


def axis_mean(
    x: Tensor, axis: int | tuple[int, ...], *, dtype: torch.dtype | None = None
) -> Tensor:
    """The mean over one axis or several, which stay with size one."""
    # As a sum, because its gradient is a view; that of torch.mean is a division of the full size.
    total = x.sum(axis, keepdim=True, dtype=wide(x))
    return (total / _count(x, axis)).to(x.dtype if dtype is None else dtype)


def global_mean(x: Tensor, *, dtype: torch.dtype | None = None) -> Tensor:
    """The mean over H and W, (B, C, H, W) -> (B, C)."""
    if dtype is None and not torch.is_grad_enabled():
        return x.mean((2, 3))
    return axis_mean(x, (2, 3), dtype=dtype)[:, :, 0, 0]


def global_mean_std(
    x: Tensor, *, eps: float = 1e-5, unbiased: bool = False
) -> tuple[Tensor, Tensor]:
    """Mean and sqrt(variance + eps) over H and W, (B, C, H, W) -> twice (B, C), at least in float32."""
    mean = global_mean(x, dtype=wide(x))
    # The norm of the centered map is exact where E[x^2] - E[x]^2 cancels.
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
