"""LKA: a large kernel, taken apart into three small convolutions, gates the map; and VAN's attention around it."""

from torch import Tensor, nn

from visattn.blocks.parts.check import require_map, require_odd, require_positive
from visattn.core.tap import Tap


def depthwise(channels: int, kernel_size: int | tuple[int, int], dilation: int = 1) -> nn.Conv2d:
    """A convolution of each channel by itself that keeps height and width."""
    extents = (kernel_size, kernel_size) if isinstance(kernel_size, int) else kernel_size
    padding = tuple(dilation * (extent // 2) for extent in extents)
    return nn.Conv2d(
        channels, channels, extents, padding=padding, dilation=dilation, groups=channels
    )


class LKA(nn.Module):
    r"""Gate each value by a large neighborhood of its channel, mixed over channels.

    .. math::
        y = x \odot W\,(k_2 *_d (k_1 * x))

    with k_1 of extent 2 d - 1 and k_2 of extent ⌈K / d⌉ and dilation d, both per channel, and W
    over channels.

    Args:
        channels: C, the width of the input.
        kernel_size: K, the extent that is taken apart, 21 in the paper.
        dilation: d.

    Shape:
        - Input: (B, C, H, W), any H and W from 1 up.
        - Output: as the input.

    Map:
        ``tap``, kind spatial: (B, C, H, W), any real values, no sum.

    Raises:
        ValueError: ``channels``, ``kernel_size`` or ``dilation`` is below 1, or ⌈K / d⌉ is even.

    Reference:
        Guo, Lu, Liu, Cheng, Hu 2022, "Visual Attention Network", https://arxiv.org/abs/2202.09741.
        Differs from: nothing.

    Example:
        >>> import torch
        >>> LKA(12)(torch.rand(2, 12, 7, 11)).shape
        torch.Size([2, 12, 7, 11])
    """

    def __init__(self, channels: int, *, kernel_size: int = 21, dilation: int = 3):
        super().__init__()
        require_positive(channels=channels, kernel_size=kernel_size, dilation=dilation)
        dilated_kernel_size = -(-kernel_size // dilation)
        require_odd(**{"kernel_size / dilation, rounded up,": dilated_kernel_size})
        self.channels = channels
        self.local = depthwise(channels, 2 * dilation - 1)
        self.dilated = depthwise(channels, dilated_kernel_size, dilation)
        self.mix = nn.Conv2d(channels, channels, 1)
        self.tap = Tap("spatial")

    def forward(self, x: Tensor) -> Tensor:
        require_map(x, self.channels)
        return x * self.tap(self.mix(self.dilated(self.local(x))))


class VANAttention(nn.Module):
    r"""The attention of the Visual Attention Network: LKA between two projections, with a residual connection.

    .. math::
        y = x + W_2\,\mathrm{LKA}(\mathrm{GELU}(W_1 x))

    Args:
        channels: C, the width of the input.
        kernel_size: As for ``LKA``.
        dilation: As for ``LKA``.

    Shape:
        - Input: (B, C, H, W), any H and W from 1 up.
        - Output: as the input.

    Map:
        ``gate.tap``, kind spatial: (B, C, H, W), any real values, no sum.

    Raises:
        ValueError: As for ``LKA``.

    Reference:
        Guo, Lu, Liu, Cheng, Hu 2022, "Visual Attention Network", https://arxiv.org/abs/2202.09741.
        Differs from: nothing.

    Example:
        >>> import torch
        >>> VANAttention(12)(torch.rand(2, 12, 7, 11)).shape
        torch.Size([2, 12, 7, 11])
    """

    def __init__(self, channels: int, *, kernel_size: int = 21, dilation: int = 3):
        super().__init__()
        self.proj1 = nn.Conv2d(channels, channels, 1)
        self.act = nn.GELU()
        self.gate = LKA(channels, kernel_size=kernel_size, dilation=dilation)
        self.proj2 = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        require_map(x, self.gate.channels)
        return x + self.proj2(self.gate(self.act(self.proj1(x))))
