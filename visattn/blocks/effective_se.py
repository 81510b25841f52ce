"""Effective squeeze-and-excitation: one full-width layer instead of a bottleneck."""

from torch import Tensor, nn

from visattn.blocks.parts.check import require_map, require_positive
from visattn.blocks.parts.gate import make_gate
from visattn.blocks.parts.pool import global_mean
from visattn.blocks.parts.products import scaled
from visattn.core.tap import Tap


class EffectiveSqueezeExcite(nn.Module):
    r"""Rescale each channel by a gate from one linear layer on the global averages.

    .. math::
        y_c = g\bigl(W \bar{x} + b\bigr)_c\; x_c, \qquad g(z) = \mathrm{ReLU6}(z + 3) / 6

    Args:
        channels: C, the width of the input.
        gate: The last function g, ``"hard_sigmoid"`` or ``"sigmoid"``.

    Shape:
        - Input: (B, C, H, W), any H and W from 1 up.
        - Output: as the input.

    Map:
        ``tap``, kind channel: (B, C, 1, 1), each value in [0, 1]; they do not sum to one.

    Raises:
        ValueError: ``channels`` is below 1, or ``gate`` is unknown.

    Reference:
        Lee, Park 2020, "CenterMask: Real-Time Anchor-Free Instance Segmentation",
        https://arxiv.org/abs/1911.06667.
        Differs from: nothing.

    Example:
        >>> import torch
        >>> EffectiveSqueezeExcite(12)(torch.rand(2, 12, 7, 11)).shape
        torch.Size([2, 12, 7, 11])
    """

    def __init__(self, channels: int, *, gate: str = "hard_sigmoid"):
        super().__init__()
        require_positive(channels=channels)
        self.channels = channels
        self.fc = nn.Linear(channels, channels)
        self.gate = make_gate(gate)
        self.tap = Tap("channel")

    def forward(self, x: Tensor) -> Tensor:
        require_map(x, self.channels)
        gate = self.gate(self.fc(global_mean(x)))
        return scaled(x, self.tap(gate[:, :, None, None]))
