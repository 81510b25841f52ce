"""The `norm=` option of blocks: batch norm as most papers have it, or one that does not look at other images."""

import torch
from torch import Tensor, nn

from visattn.blocks.parts.check import require_choice
from visattn.blocks.parts.products import plain

NORMS = ("batch", "layer", "none")
# Values of a map from which on passes over memory outweigh the calls that save them.
_LARGE = 2**20


class _Normalized(torch.autograd.Function):
    """Batch norm by the statistics of the batch; its gradient takes sums from the vectorized one of a group norm."""

    @staticmethod
    def forward(
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        mean: Tensor,
        var: Tensor,
        momentum: float,
        eps: float,
    ):
        return torch.native_batch_norm(x, weight, bias, mean, var, True, momentum, eps)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.save_for_backward(*inputs[:2], *output[1:])
        ctx.mark_non_differentiable(*output[1:])
        ctx.eps = inputs[-1]

    @staticmethod
    def backward(ctx, gradient: Tensor, *_) -> tuple[Tensor | None, ...]:
        x, weight, mean, rstd = ctx.saved_tensors
        if torch.is_grad_enabled():  # a second derivative is wanted
            backward = torch.ops.aten.native_batch_norm_backward
            given = backward(gradient, x, weight, None, None, mean, rstd, True, ctx.eps, [True] * 3)
            return *given, None, None, None, None
        size, area = x.shape[:2], x.size(2) * x.size(3)
        statistics = (one.expand(size).contiguous() for one in (mean, rstd))
        backward, wanted = torch.ops.aten.native_group_norm_backward, [False, True, True]
        _, dweight, dbias = backward(
            gradient.contiguous(), x, *statistics, weight, *size, area, size[1], wanted
        )
        scale = weight * rstd
        slope = -scale * rstd * dweight / (size[0] * area)
        offset = -scale * dbias / (size[0] * area) - slope * mean
        scale, slope, offset = (one[:, None, None] for one in (scale, slope, offset))
        return (
            torch.addcmul(offset, gradient, scale).addcmul_(x, slope),
            dweight,
            dbias,
            None,
            None,
            None,
            None,
        )


class BatchNorm(nn.BatchNorm2d):
    r"""Batch normalization that says what to do when a training batch holds one value per channel.

    .. math::
        y_c = w_c \frac{x_c - \mu_c}{\sqrt{\sigma_c^2 + \epsilon}} + b_c

    Args:
        As ``torch.nn.BatchNorm2d``.

    Shape:
        - Input and output: (B, C, H, W).

    Raises:
        ValueError: In training, B * H * W is 1: one value per channel has no variance.

    Reference:
        Ioffe, Szegedy 2015, https://arxiv.org/abs/1502.03167. Differs from ``torch.nn.BatchNorm2d``
        in: the message.

    Example:
        >>> import torch
        >>> BatchNorm(3).eval()(torch.rand(1, 3, 1, 1)).shape
        torch.Size([1, 3, 1, 1])
    """

    def forward(self, x: Tensor) -> Tensor:
        self.check(x)
        # A momentum of None is an average over all batches, which torch keeps: swa_utils.update_bn
        # sets it.
        if not self.training or self.momentum is None or plain(x, self.weight) or not _is_large(x):
            return super().forward(x)
        self.num_batches_tracked.add_(1)
        return _Normalized.apply(
            x, self.weight, self.bias, self.running_mean, self.running_var, self.momentum, self.eps
        )[0]

    def check(self, x: Tensor) -> None:
        """Refuse to train on a single value per channel."""
        if self.training and x.numel() == x.size(1):
            raise ValueError(
                f"batch norm cannot train on one value per channel, got {tuple(x.shape)}: "
                "use two images or more, or norm='layer'"
            )


def _is_large(x: Tensor) -> bool:
    return x.is_contiguous() and x.numel() >= _LARGE


def make_norm(norm: str, channels: int, *, eps: float = 1e-5, momentum: float = 0.1) -> nn.Module:
    """Batch norm, layer norm over (C, H, W) of each image, or none."""
    require_choice("norm", norm, NORMS)
    if norm == "batch":
        return BatchNorm(channels, eps=eps, momentum=momentum)
    return nn.GroupNorm(1, channels, eps=eps) if norm == "layer" else nn.Identity()
