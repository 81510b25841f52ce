"""Shuffle attention (SA-Net): in each group one half is gated by channel, the other by position; then a shuffle."""

import torch
from torch import Tensor, nn

from visattn.blocks.check import require_divisible, require_map, require_positive
from visattn.blocks.moments import centered
from visattn.blocks.pool import wide
from visattn.core.tap import Tap


class ShuffleAttention(nn.Module):
    r"""Gate half of each group by its averages, half by its normalized values, and shuffle the channels.

    .. math::
        y^{(1)} = x^{(1)}\,\sigma(w_1 \bar{x}^{(1)} + b_1), \qquad
        y^{(2)} = x^{(2)}\,\sigma(w_2\,\mathrm{GN}(x^{(2)}) + b_2), \qquad
        y = \mathrm{shuffle}_2([y^{(1)}; y^{(2)}])

    with one w and b per channel of a half, shared by all groups, and GN normalizing each channel by itself.

    Args:
        channels: C, the width of the input.
        groups: G, each of C / G channels.
        eps: Added to the variance.

    Shape:
        - Input: (B, C, H, W), any H and W from 1 up.
        - Output: as the input; channel 2 i + s of the output comes from channel s C / 2 + i of the input.

    Map:
        ``tap``, kind spatial: (B, C, H, W), in the order of the output's channels, values in (0, 1), no sum; constant
        over the positions where the channel gate acts.

    Raises:
        ValueError: ``channels`` is no multiple of ``2 * groups``.

    Reference:
        Zhang, Yang 2021, "SA-Net: Shuffle Attention for Deep Convolutional Neural Networks", eq. 1-5,
        https://arxiv.org/abs/2102.00240. Differs from: nothing.

    Example:
        >>> import torch
        >>> ShuffleAttention(12, groups=3)(torch.rand(2, 12, 7, 11)).shape
        torch.Size([2, 12, 7, 11])
    """

    def __init__(self, channels: int, *, groups: int = 64, eps: float = 1e-5):
        super().__init__()
        require_positive(channels=channels, groups=groups)
        require_divisible(channels, 2 * groups, groups_name="2 * groups")
        self.channels = channels
        self.groups = groups
        self.eps = eps
        half = channels // (2 * groups)
        self.channel_weight = nn.Parameter(torch.zeros(half))
        self.channel_bias = nn.Parameter(torch.ones(half))
        self.spatial_weight = nn.Parameter(torch.zeros(half))
        self.spatial_bias = nn.Parameter(torch.ones(half))
        self.norm_weight = nn.Parameter(torch.ones(half))
        self.norm_bias = nn.Parameter(torch.zeros(half))
        self.tap = Tap("spatial")

    def forward(self, x: Tensor) -> Tensor:
        require_map(x, self.channels)
        halves = x.unflatten(1, (self.groups, 2, -1))
        mean = halves[:, :, 0].mean((3, 4), dtype=wide(x))
        channel = self.channel_weight * mean + self.channel_bias
        slope, offset = self.normalizing(halves[:, :, 1])
        slope = torch.stack((torch.zeros_like(slope), slope), 2)[..., None, None].to(x.dtype)
        offset = torch.stack((channel, offset), 2)[..., None, None].to(x.dtype)
        x = self.shuffled(x)
        # Elementwise results take the memory order of their first operand: with the small ones laid out in the shuffled
        # order, the gated map is born shuffled, and no pass over memory is spent on the shuffle.
        slope, offset = (self.shuffled(small.flatten(1, 3)).contiguous() for small in (slope, offset))
        gate = torch.addcmul(offset, slope, x).sigmoid_()
        gate = self.tap(gate.flatten(1, 2)).unflatten(1, (-1, 2))
        return (gate * x).flatten(1, 2)

    def normalizing(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Slope and offset (B, G, C / 2G) of the line that normalizes and scales each channel of a map."""
        _, mean, norm = centered(x, (3, 4))
        deviation = (norm.square() / (x.size(3) * x.size(4)) + self.eps).sqrt()[..., 0, 0]
        slope = self.spatial_weight * self.norm_weight / deviation
        return slope, self.spatial_weight * self.norm_bias + self.spatial_bias - slope * mean[..., 0, 0]

    def shuffled(self, x: Tensor) -> Tensor:
        """(B, C, H, W) as a view (B, C / 2, 2, H, W) whose flattened channels are the shuffled ones."""
        return x.unflatten(1, (2, self.channels // 2)).transpose(1, 2)
