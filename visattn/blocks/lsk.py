"""LSK: two large kernels of different extent, chosen position by position, gate the map."""

import torch
from torch import Tensor, nn

from visattn.blocks.lka import depthwise
from visattn.blocks.parts.check import require_map, require_odd
from visattn.blocks.parts.pool import max_and_mean
from visattn.core.tap import Tap


class LSK(nn.Module):
    r"""Choose at each position between two extents of neighborhood, and gate the map by the mixture.

    .. math::
        y = x \odot W(s_1 u_1 + s_2 u_2), \qquad [s_1; s_2] = \sigma(k_7 * [\mathrm{mean}_c\,u;\; \max_c u]), \qquad
        u_1 = W_1(k_5 * x), \quad u_2 = W_2(k_7 *_3 k_5 * x)

    with mean and maximum over the channels of both u, each of C / 2 channels.

    Args:
        channels: C, the width of the input.
        kernel_size: Extent of the convolution that chooses, odd.

    Shape:
        - Input: (B, C, H, W), any H and W from 1 up.
        - Output: as the input.

    Map:
        ``tap``, kind spatial: (B, 2, H, W), the smaller extent first, values in (0, 1), no sum.

    Raises:
        ValueError: ``channels`` is below 2 or ``kernel_size`` even.

    Reference:
        Li et al. 2023, "Large Selective Kernel Network for Remote Sensing Object Detection",
        https://arxiv.org/abs/2303.09030. Differs from: nothing.

    Example:
        >>> import torch
        >>> LSK(12)(torch.rand(2, 12, 7, 11)).shape
        torch.Size([2, 12, 7, 11])
    """

    def __init__(self, channels: int, *, kernel_size: int = 7):
        super().__init__()
        if channels < 2:
            raise ValueError(f"channels must be 2 or more; got {channels}")
        require_odd(kernel_size=kernel_size)
        half = channels // 2
        self.channels = channels
        self.local = depthwise(channels, 5)
        self.dilated = depthwise(channels, 7, 3)
        self.mix_local = nn.Conv2d(channels, half, 1)
        self.mix_dilated = nn.Conv2d(channels, half, 1)
        self.choose = nn.Conv2d(2, 2, kernel_size, padding=kernel_size // 2)
        self.mix = nn.Conv2d(half, channels, 1)
        self.tap = Tap("spatial")

    def forward(self, x: Tensor) -> Tensor:
        require_map(x, self.channels)
        near = self.local(x)
        near, far = self.mix_local(near), self.mix_dilated(self.dilated(near))
        (near_max, near_mean), (far_max, far_mean) = (
            max_and_mean(part, (1,))[0] for part in (near, far)
        )
        mean, highest = (near_mean + far_mean) / 2, torch.maximum(near_max, far_max)
        gates = self.tap(self.choose(torch.cat((mean, highest), 1)).sigmoid())
        return x * self.mix(near * gates[:, :1] + far * gates[:, 1:])
