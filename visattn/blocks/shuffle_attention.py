"""Shuffle attention (SA-Net): in each group one half is gated by channel, the other by position; then a shuffle."""

import torch
from torch import Tensor, nn

from visattn.blocks.parts.check import require_divisible, require_map, require_positive
from visattn.blocks.parts.pool import axis_mean
from visattn.core.tap import Tap


class _ShuffledProduct(torch.autograd.Function):
    """The product of two maps with its channels shuffled in two groups, without a pass over memory for the shuffle."""

    @staticmethod
    def forward(x: Tensor, gate: Tensor) -> Tensor:
        # Elementwise results take the memory order of their first operand: zeros that lie in the
        # shuffled order.
        order = x.new_zeros(1, x.size(1) // 2, 2, 1, 1)
        pairs = (1, (2, x.size(1) // 2))
        return torch.addcmul(
            order, x.unflatten(*pairs).transpose(1, 2), gate.unflatten(*pairs).transpose(1, 2)
        ).flatten(1, 2)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, Tensor]:
        x, gate = (map_.unflatten(1, (2, -1)) for map_ in ctx.saved_tensors)
        gradient = gradient.unflatten(1, (-1, 2)).transpose(1, 2)
        return (gate * gradient).flatten(1, 2), (x * gradient).flatten(1, 2)


class ShuffleAttention(nn.Module):
    r"""Gate half of each group by its averages, half by its normalized values, and shuffle the channels.

    .. math::
        y^{(1)} = x^{(1)}\,\sigma(w_1 \bar{x}^{(1)} + b_1), \qquad
        y^{(2)} = x^{(2)}\,\sigma(w_2\,\mathrm{GN}(x^{(2)}) + b_2), \qquad
        y = \mathrm{shuffle}_2([y^{(1)}; y^{(2)}])

    with one w and b per channel of a half, shared by all groups, and GN normalizing each channel by
    itself.

    Args:
        channels: C, the width of the input.
        groups: G, each of C / G channels.
        eps: Added to the variance.

    Shape:
        - Input: (B, C, H, W), any H and W from 1 up.
        - Output: as the input; channel 2 i + s of the output comes from channel s C / 2 + i of the
          input.

    Map:
        ``tap``, kind spatial: (B, C, H, W), in the order of the input's channels, values in (0, 1),
        no sum; constant over the positions where the channel gate acts.

    Raises:
        ValueError: ``channels`` is no multiple of ``2 * groups``.

    Reference:
        Zhang, Yang 2021, "SA-Net: Shuffle Attention for Deep Convolutional Neural Networks",
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
        first, second = x.unflatten(1, (self.groups, 2, -1)).unbind(2)
        mean = axis_mean(first, (3, 4))
        channel = (
            self.channel_weight[:, None, None] * mean + self.channel_bias[:, None, None]
        ).sigmoid()
        spatial = self._normalized(second.flatten(1, 2)).sigmoid_().unflatten(1, (self.groups, -1))
        gate = self.tap(
            torch.stack((channel.expand_as(second), spatial), 2).flatten(1, 3).to(x.dtype)
        )
        return _ShuffledProduct.apply(x, gate)

    def _normalized(self, x: Tensor) -> Tensor:
        """Each channel of (B, C / 2, H, W) normalized by itself, then scaled: two affine maps in one."""
        weight = (self.spatial_weight * self.norm_weight).repeat(self.groups)
        bias = (self.spatial_weight * self.norm_bias + self.spatial_bias).repeat(self.groups)
        return torch.group_norm(x, x.size(1), weight, bias, self.eps)
