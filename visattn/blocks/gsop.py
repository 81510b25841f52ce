"""Global second-order pooling: squeeze-and-excitation on the covariance of the channels."""

from torch import Tensor, nn

from visattn.blocks.parts.check import require_map, require_positive
from visattn.blocks.parts.norm import make_norm
from visattn.blocks.parts.pool import axis_mean
from visattn.blocks.parts.products import scaled
from visattn.core.tap import Tap


class SecondOrderPooling(nn.Module):
    r"""Rescale each channel by a gate computed from the covariance matrix of the channels.

    .. math::
        y = x \odot \sigma\bigl(W_2\, \mathrm{rows}(\mathrm{BN}(\Sigma))\bigr), \qquad
        \Sigma = \tfrac{1}{HW} (z - \bar z)(z - \bar z)^\top, \qquad z = \mathrm{ReLU}(\mathrm{BN}(W_1 x))

    rows maps each of the d rows of the covariance to four values by weights of its own.

    Args:
        channels: C, the width of the input.
        hidden: d, to which the channels are reduced first.
        norm: ``"batch"``, ``"layer"`` or ``"none"``.

    Shape:
        - Input: (B, C, H, W), any H and W from 1 up (where a single position has covariance zero).
        - Output: as the input.

    Map:
        ``tap``, kind channel: (B, C, 1, 1), each value in (0, 1); they do not sum to one.

    Raises:
        ValueError: ``channels`` or ``hidden`` is below 1, or ``norm`` is unknown.

    Reference:
        Gao et al. 2019, "Global Second-order Pooling Convolutional Networks",
        https://arxiv.org/abs/1811.12006; the channel part. Differs from the authors' code in: that
        puts a ReLU on the input of the gate, because it stands before the addition of a residual
        block, and strides W_1 by two in the widest maps.

    Example:
        >>> import torch
        >>> SecondOrderPooling(12, hidden=8)(torch.rand(2, 12, 7, 11)).shape
        torch.Size([2, 12, 7, 11])
    """

    def __init__(self, channels: int, *, hidden: int = 128, norm: str = "batch"):
        super().__init__()
        require_positive(channels=channels, hidden=hidden)
        self.channels = channels
        self.conv = nn.Conv2d(channels, hidden, 1)
        self.norm = make_norm(norm, hidden)
        self.act = nn.ReLU()
        self.row_norm = make_norm(norm, hidden)
        self.rows = nn.Conv2d(hidden, 4 * hidden, (hidden, 1), groups=hidden)
        self.fc = nn.Linear(4 * hidden, channels)
        self.gate = nn.Sigmoid()
        self.tap = Tap("channel")

    def forward(self, x: Tensor) -> Tensor:
        require_map(x, self.channels)
        z = self.act(self.norm(self.conv(x))).flatten(2)
        z = z - axis_mean(z, 2)
        covariance = z @ z.transpose(1, 2) / z.size(2)
        rows = self.rows(self.row_norm(covariance[..., None]))
        gate = self.gate(self.fc(rows.flatten(1)))
        return scaled(x, self.tap(gate[:, :, None, None]))
