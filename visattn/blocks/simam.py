"""SimAM: a gate per value, from how far it lies from the rest of its channel; no parameters."""

import torch
from torch import Tensor, nn

from visattn.blocks.check import require_map, require_positive
from visattn.blocks.moments import centered
from visattn.core.tap import Tap


class SimAM(nn.Module):
    r"""Gate each value by its inverse energy: values that stand out from their channel pass more.

    .. math::
        y = x\;\sigma\Bigl(\frac{(x - \mu)^2}{4\,(\sigma^2 + \lambda)} + \frac{1}{2}\Bigr),
        \qquad \sigma^2 = \frac{1}{HW - 1}\sum_{ij} (x_{ij} - \mu)^2 \quad\text{per channel}

    Args:
        channels: C, the width of the input.
        regularizer: λ, keeps the energy finite where a channel is constant.

    Shape:
        - Input: (B, C, H, W), any H and W from 1 up; on 1 x 1, where the variance has no meaning, it counts as zero.
        - Output: as the input.

    Map:
        ``tap``, kind spatial: (B, C, H, W), values in (0.62, 1), no sum.

    Raises:
        ValueError: ``channels`` is below 1 or ``regularizer`` is not positive.

    Reference:
        Yang, Zhang, Li, Xie 2021, "SimAM: A Simple, Parameter-Free Attention Module for Convolutional Neural
        Networks", https://proceedings.mlr.press/v139/yang21o.html. Differs from the authors' code in: 1 x 1 maps are
        defined (there 0 / 0). The closed form of the paper divides by HW, its listing and the code by HW - 1: so here.

    Example:
        >>> import torch
        >>> SimAM(12)(torch.rand(2, 12, 7, 11)).shape
        torch.Size([2, 12, 7, 11])
    """

    def __init__(self, channels: int, *, regularizer: float = 1e-4):
        super().__init__()
        require_positive(channels=channels)
        if regularizer <= 0:
            raise ValueError(f"regularizer must be positive; got {regularizer}")
        self.channels = channels
        self.regularizer = regularizer
        self.tap = Tap("spatial")

    def forward(self, x: Tensor) -> Tensor:
        require_map(x, self.channels)
        rest, _, norm = centered(x, (2, 3))
        variance = norm.square() / torch.sym_max(x.size(2) * x.size(3) - 1, 1)
        rest = rest * (4 * (variance + self.regularizer)).rsqrt()
        gate = rest.square().add_(0.5).sigmoid_()
        return x * self.tap(gate.to(x.dtype))
