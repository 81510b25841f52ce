"""MSCA, the attention of SegNeXt: strips of three extents, summed, gate the map."""

from torch import Tensor, nn

from visattn.blocks.lka import depthwise
from visattn.blocks.parts.check import require_map, require_odd, require_positive
from visattn.core.tap import Tap


class MSCA(nn.Module):
    r"""Gate each value by neighborhoods of several extents, each a pair of strip convolutions.

    .. math::
        y = x \odot W\Bigl(u + \textstyle\sum_k s^v_k * s^h_k * u\Bigr), \qquad u = k_5 * x

    with all kernels per channel and W over channels.

    Args:
        channels: C, the width of the input.
        kernel_size: Extent of the first convolution, odd.
        strip_sizes: Extents of the strips, odd.

    Shape:
        - Input: (B, C, H, W), any H and W from 1 up.
        - Output: as the input.

    Map:
        ``tap``, kind spatial: (B, C, H, W), any real values, no sum.

    Raises:
        ValueError: An extent is even, or ``channels`` below 1.

    Reference:
        Guo, Lu, Hou, Liu, Cheng, Hu 2022, "SegNeXt: Rethinking Convolutional Attention Design for
        Semantic Segmentation", https://arxiv.org/abs/2209.08575. Differs from: nothing.

    Example:
        >>> import torch
        >>> MSCA(12)(torch.rand(2, 12, 7, 11)).shape
        torch.Size([2, 12, 7, 11])
    """

    def __init__(
        self, channels: int, *, kernel_size: int = 5, strip_sizes: tuple[int, ...] = (7, 11, 21)
    ):
        super().__init__()
        require_positive(channels=channels)
        require_odd(
            kernel_size=kernel_size,
            **{f"strip_sizes[{i}]": size for i, size in enumerate(strip_sizes)},
        )
        self.channels = channels
        self.local = depthwise(channels, kernel_size)
        self.strips = nn.ModuleList(
            nn.Sequential(depthwise(channels, (1, size)), depthwise(channels, (size, 1)))
            for size in strip_sizes
        )
        self.mix = nn.Conv2d(channels, channels, 1)
        self.tap = Tap("spatial")

    def forward(self, x: Tensor) -> Tensor:
        require_map(x, self.channels)
        local = self.local(x)
        gate = local
        for strip in self.strips:
            gate = gate + strip(local)
        return x * self.tap(self.mix(gate))
