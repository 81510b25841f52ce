"""EMA: multi-scale gates in groups of channels, where each scale's averages weigh the other's positions."""

import torch
from torch import Tensor, nn

from visattn.blocks.parts.check import require_divisible, require_map, require_positive
from visattn.blocks.parts.pool import axis_mean, global_mean, wide
from visattn.blocks.parts.products import contracted, scaled
from visattn.core.tap import Tap


class EMA(nn.Module):
    r"""Gate the positions of each group by two scales that look at each other: strips with 1 x 1, and 3 x 3.

    .. math::
        u = \mathrm{GN}\bigl(x\,\sigma(f_h)\,\sigma(f_w)\bigr),\quad [f_h; f_w] = W_1[\bar{x}^h; \bar{x}^w],\quad
        v = W_3 * x,\qquad
        y = x\;\sigma\bigl(\mathrm{softmax}(\bar{u})^\top v + \mathrm{softmax}(\bar{v})^\top u\bigr)

    in each group by itself, with weights shared by the groups; the softmax is over the C / G
    channels of a group.

    Args:
        channels: C, the width of the input.
        groups: G (the paper's factor), each of C / G channels.

    Shape:
        - Input: (B, C, H, W), any H and W from 1 up.
        - Output: as the input.

    Map:
        ``tap``, kind spatial: (B, G, H, W), values in (0, 1), no sum.

    Raises:
        ValueError: ``channels`` is no multiple of ``groups``.

    Reference:
        Ouyang et al. 2023, "Efficient Multi-Scale Attention Module with Cross-Spatial Learning",
        https://arxiv.org/abs/2305.13563. Differs from: nothing.

    Example:
        >>> import torch
        >>> EMA(12, groups=3)(torch.rand(2, 12, 7, 11)).shape
        torch.Size([2, 12, 7, 11])
    """

    def __init__(self, channels: int, *, groups: int = 32):
        super().__init__()
        require_positive(channels=channels)
        require_divisible(channels, groups)
        self.channels = channels
        self.groups = groups
        width = channels // groups
        self.conv_strip = nn.Conv1d(width, width, 1)
        self.conv_local = nn.Conv2d(width, width, 3, padding=1)
        self.norm = nn.GroupNorm(width, width)
        self.tap = Tap("spatial")

    def forward(self, x: Tensor) -> Tensor:
        require_map(x, self.channels)
        grouped = x.unflatten(1, (self.groups, -1))
        gate = (
            self._score(grouped.flatten(0, 1)).sigmoid().view(x.size(0), -1, x.size(2), x.size(3))
        )
        return scaled(grouped, self.tap(gate.to(x.dtype)).unsqueeze(2)).flatten(1, 2)

    def _score(self, x: Tensor) -> Tensor:
        """What the two scales make of each group, taken as an image: (B * G, C / G, H, W) -> (B * G, 1, H * W)."""
        strips = self.conv_strip(
            torch.cat((axis_mean(x, 3)[..., 0], axis_mean(x, 2)[:, :, 0]), 2)
        ).sigmoid()
        gate_h, gate_w = strips.split((x.size(2), x.size(3)), 2)
        near = self.norm(scaled(x, gate_h.unsqueeze(3), gate_w.unsqueeze(2)))
        local = self.conv_local(x)
        return _weighed(local, near) + _weighed(near, local)


def _weighed(x: Tensor, by: Tensor) -> Tensor:
    """The channels of `x` summed with weights from the averages of `by`: (B, C, H, W) twice -> (B, 1, H * W)."""
    weights = global_mean(by).softmax(1, dtype=wide(by))
    return contracted(x.flatten(2), weights.to(x.dtype), 1).unsqueeze(1)
