"""The `norm=` option of blocks: batch norm as most papers have it, or one that does not look at other images."""

from torch import Tensor, nn

from visattn.blocks.check import require_choice

NORMS = ("batch", "layer", "none")


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
        Ioffe, Szegedy 2015, https://arxiv.org/abs/1502.03167. Differs from ``torch.nn.BatchNorm2d`` in: the message.

    Example:
        >>> import torch
        >>> BatchNorm(3).eval()(torch.rand(1, 3, 1, 1)).shape
        torch.Size([1, 3, 1, 1])
    """

    def forward(self, x: Tensor) -> Tensor:
        self.check(x)
        return super().forward(x)

    def check(self, x: Tensor) -> None:
        """Refuse to train on a single value per channel."""
        if self.training and x.numel() == x.size(1):
            raise ValueError(
                f"batch norm cannot train on one value per channel, got {tuple(x.shape)}: "
                "use two images or more, or norm='layer'"
            )


def make_norm(norm: str, channels: int, *, eps: float = 1e-5, momentum: float = 0.1) -> nn.Module:
    """Batch norm, layer norm over (C, H, W) of each image, or none."""
    require_choice("norm", norm, NORMS)
    if norm == "batch":
        return BatchNorm(channels, eps=eps, momentum=momentum)
    return nn.GroupNorm(1, channels, eps=eps) if norm == "layer" else nn.Identity()
