"""scSE: squeeze-and-excitation over channels and, concurrently, over positions."""

import torch
from torch import Tensor, nn

from visattn.blocks.parts.check import hidden_width, require_choice, require_map
from visattn.blocks.parts.pool import global_mean
from visattn.blocks.parts.products import scaled, scaled_by_sum
from visattn.core.tap import Tap

MERGE = ("add", "max")


class ConcurrentSqueezeExcite(nn.Module):
    r"""Rescale the input by a gate per channel and by a gate per position, and merge the two results.

    .. math::
        y = x \odot \sigma\bigl(W_2\,\mathrm{ReLU}(W_1 \bar{x} + b_1) + b_2\bigr) \;+\; x \odot \sigma(w * x + b)

    Args:
        channels: C, the width of the input.
        reduction: r, so the hidden width is ``max(1, C // r)``.
        merge: ``"add"`` as above, or ``"max"``: the larger of the two values, as the authors' code.

    Shape:
        - Input: (B, C, H, W), any H and W from 1 up.
        - Output: as the input.

    Map:
        ``tap_channel``, kind channel: (B, C, 1, 1), and ``tap_spatial``, kind spatial: (B, 1, H,
        W); each value in (0, 1); they do not sum to one.

    Raises:
        ValueError: ``channels`` or ``reduction`` is below 1, or ``merge`` is unknown.

    Reference:
        Roy, Navab, Wachinger 2018, "Concurrent Spatial and Channel Squeeze & Excitation in Fully
        Convolutional Networks", https://arxiv.org/abs/1803.02579. Differs from the authors' code
        in: that takes the maximum (``merge="max"``).

    Example:
        >>> import torch
        >>> ConcurrentSqueezeExcite(12)(torch.rand(2, 12, 7, 11)).shape
        torch.Size([2, 12, 7, 11])
    """

    def __init__(self, channels: int, *, reduction: int = 2, merge: str = "add"):
        super().__init__()
        hidden = hidden_width(channels, reduction)
        require_choice("merge", merge, MERGE)
        self.channels, self.merge = channels, merge
        self.fc1 = nn.Linear(channels, hidden)
        self.act = nn.ReLU()
        self.fc2 = nn.Linear(hidden, channels)
        self.conv = nn.Conv2d(channels, 1, 1)
        self.gate = nn.Sigmoid()
        self.tap_channel = Tap("channel")
        self.tap_spatial = Tap("spatial")

    def forward(self, x: Tensor) -> Tensor:
        require_map(x, self.channels)
        gate = self.gate(self.fc2(self.act(self.fc1(global_mean(x)))))
        channel = self.tap_channel(gate[:, :, None, None])
        spatial = self.tap_spatial(self.gate(self.conv(x)))
        if self.merge == "add":
            return scaled_by_sum(x, channel, spatial)
        return torch.maximum(scaled(x, channel), scaled(x, spatial))
