"""LSKA: the large kernel of LKA, further taken apart into rows and columns."""

from torch import Tensor, nn

from visattn.blocks.lka import depthwise
from visattn.blocks.parts.check import require_map, require_odd, require_positive
from visattn.core.tap import Tap


class LSKA(nn.Module):
    r"""Gate each value by a large neighborhood of its channel, in four one-dimensional convolutions.

    .. math::
        y = x \odot W\,\bigl(k_2^v *_d k_2^h *_d k_1^v * k_1^h * x\bigr)

    with k_1 of extent 2 d - 1 and k_2 of extent ⌊K / d⌋ and dilation d, per channel, h along rows
    and v along columns.

    Args:
        channels: C, the width of the input.
        kernel_size: K, the extent that is taken apart: 7, 11, 23, 35, 41 or 53 in the paper.
        dilation: d; None takes the paper's, 2 for K below 23, else 3.

    Shape:
        - Input: (B, C, H, W), any H and W from 1 up.
        - Output: as the input.

    Map:
        ``tap``, kind spatial: (B, C, H, W), any real values, no sum.

    Raises:
        ValueError: ``channels``, ``kernel_size`` or ``dilation`` is below 1, or ⌊K / d⌋ is even or
            zero.

    Reference:
        Lau, Po, Rehman 2023, "Large Separable Kernel Attention: Rethinking the Large Kernel
        Attention Design in CNN", https://arxiv.org/abs/2309.01439. Differs from: nothing.

    Example:
        >>> import torch
        >>> LSKA(12, kernel_size=11)(torch.rand(2, 12, 7, 11)).shape
        torch.Size([2, 12, 7, 11])
    """

    def __init__(self, channels: int, *, kernel_size: int = 23, dilation: int | None = None):
        super().__init__()
        dilation = (2 if kernel_size < 23 else 3) if dilation is None else dilation
        require_positive(channels=channels, kernel_size=kernel_size, dilation=dilation)
        extent = kernel_size // dilation
        require_odd(**{"kernel_size / dilation, rounded down,": extent})
        self.channels = channels
        self.local_h = depthwise(channels, (1, 2 * dilation - 1))
        self.local_v = depthwise(channels, (2 * dilation - 1, 1))
        self.dilated_h = depthwise(channels, (1, extent), dilation)
        self.dilated_v = depthwise(channels, (extent, 1), dilation)
        self.mix = nn.Conv2d(channels, channels, 1)
        self.tap = Tap("spatial")

    def forward(self, x: Tensor) -> Tensor:
        require_map(x, self.channels)
        gate = self.dilated_v(self.dilated_h(self.local_v(self.local_h(x))))
        return x * self.tap(self.mix(gate))
