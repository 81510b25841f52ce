"""Efficient channel attention: each gate sees only the neighboring channels."""

import math

import torch.nn.functional as F
from torch import Tensor, nn

from visattn.blocks.parts.check import require_map, require_odd, require_positive
from visattn.blocks.parts.pool import global_mean
from visattn.blocks.parts.products import scaled
from visattn.core.tap import Tap


def adaptive_kernel_size(channels: int, gamma: float = 2, offset: float = 1) -> int:
    """The odd extent near (log2(channels) + offset) / gamma, and 3 at least."""
    extent = int(abs((math.log2(channels) + offset) / gamma))
    return max(3, extent if extent % 2 else extent + 1)


class EfficientChannelAttention(nn.Module):
    r"""Rescale each channel by a gate from a convolution across the global averages of its neighbors.

    .. math::
        y_c = \sigma\Bigl(\textstyle\sum_{i=-\lfloor k/2 \rfloor}^{\lfloor k/2 \rfloor} w_i\, \bar{x}_{c+i}\Bigr)\, x_c,
        \qquad k = \Bigl|\frac{\log_2 C + b}{\gamma}\Bigr|_\text{odd}

    Args:
        channels: C, the width of the input.
        kernel_size: k, odd; None chooses it from C by the formula above with gamma = 2 and b = 1.

    Shape:
        - Input: (B, C, H, W), any H and W from 1 up.
        - Output: as the input.

    Map:
        ``tap``, kind channel: (B, C, 1, 1), each value in (0, 1); they do not sum to one.

    Raises:
        ValueError: ``channels`` is below 1, or ``kernel_size`` is even.

    Reference:
        Wang et al. 2020, "ECA-Net: Efficient Channel Attention for Deep Convolutional Neural
        Networks", https://arxiv.org/abs/1910.03151. Differs from the authors' code in: that sets k
        by hand instead of the formula (``kernel_size=3`` in its layer).

    Example:
        >>> import torch
        >>> EfficientChannelAttention(256).kernel_size
        5
        >>> EfficientChannelAttention(12)(torch.rand(2, 12, 7, 11)).shape
        torch.Size([2, 12, 7, 11])
    """

    def __init__(self, channels: int, *, kernel_size: int | None = None):
        super().__init__()
        require_positive(channels=channels)
        self.channels = channels
        self.kernel_size = adaptive_kernel_size(channels) if kernel_size is None else kernel_size
        require_odd(kernel_size=self.kernel_size)
        self.conv = nn.Conv1d(1, 1, self.kernel_size, padding=self.kernel_size // 2, bias=False)
        self.gate = nn.Sigmoid()
        self.tap = Tap("channel")

    def forward(self, x: Tensor) -> Tensor:
        require_map(x, self.channels)
        # A product with the shifted means: what the convolution computes, without the overhead of
        # one.
        means = F.pad(global_mean(x), (self.kernel_size // 2,) * 2).unfold(1, self.kernel_size, 1)
        gate = self.gate(means @ self.conv.weight.flatten())
        return scaled(x, self.tap(gate[:, :, None, None]))
