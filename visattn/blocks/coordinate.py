"""Coordinate attention: a gate per channel and row times a gate per channel and column."""

import torch
from torch import Tensor, nn

from visattn.blocks.parts.check import hidden_width, require_map
from visattn.blocks.parts.norm import make_norm
from visattn.blocks.parts.pool import axis_mean
from visattn.blocks.parts.products import scaled
from visattn.core.tap import Tap


class CoordinateAttention(nn.Module):
    r"""Rescale each value by a gate of its row and a gate of its column.

    .. math::
        y_{cij} = \sigma(W_h f^h)_{ci}\; \sigma(W_w f^w)_{cj}\; x_{cij}, \qquad
        [f^h; f^w] = \mathrm{hswish}\bigl(\mathrm{BN}(W_1 [\bar x_{c i \cdot};\, \bar x_{c \cdot j}])\bigr)

    Args:
        channels: C, the width of the input.
        reduction: r, so the hidden width is ``max(8, C // r)``.
        bias: Whether the three 1 x 1 convolutions have biases.
        norm: ``"batch"``, ``"layer"`` or ``"none"``.

    Shape:
        - Input: (B, C, H, W), any H and W from 1 up.
        - Output: as the input.

    Map:
        ``tap_h`` and ``tap_w``, kind spatial: (B, C, H, 1) and (B, C, 1, W), each value in (0, 1);
        no sum.

    Raises:
        ValueError: ``channels`` or ``reduction`` is below 1, or ``norm`` is unknown.

    Reference:
        Hou, Zhou, Feng 2021, "Coordinate Attention for Efficient Mobile Network Design",
        https://arxiv.org/abs/2103.02907. Differs from: the paper's general non-linearity is the
        h-swish of the authors' code.

    Example:
        >>> import torch
        >>> CoordinateAttention(12)(torch.rand(2, 12, 7, 11)).shape
        torch.Size([2, 12, 7, 11])
    """

    def __init__(
        self, channels: int, *, reduction: int = 32, bias: bool = True, norm: str = "batch"
    ):
        super().__init__()
        hidden = hidden_width(channels, reduction, at_least=8)
        self.channels = channels
        self.conv = nn.Conv2d(channels, hidden, 1, bias=bias)
        self.norm = make_norm(norm, hidden)
        self.act = nn.Hardswish()
        self.conv_h = nn.Conv2d(hidden, channels, 1, bias=bias)
        self.conv_w = nn.Conv2d(hidden, channels, 1, bias=bias)
        self.gate = nn.Sigmoid()
        self.tap_h, self.tap_w = Tap("spatial"), Tap("spatial")

    def forward(self, x: Tensor) -> Tensor:
        require_map(x, self.channels)
        height, width = x.shape[2:]
        strips = torch.cat([axis_mean(x, 3), axis_mean(x, 2).transpose(2, 3)], 2)
        rows, columns = self.act(self.norm(self.conv(strips))).split([height, width], 2)
        gate_h = self.tap_h(self.gate(self.conv_h(rows)))
        gate_w = self.tap_w(self.gate(self.conv_w(columns.transpose(2, 3))))
        return scaled(x, gate_h, gate_w)
