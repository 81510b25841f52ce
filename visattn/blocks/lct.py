"""Linear context transform: each gate is an affine function of its channel's normalized average."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from visattn.blocks.parts.check import require_divisible, require_map, require_positive
from visattn.blocks.parts.pool import global_mean, wide
from visattn.blocks.parts.products import scaled
from visattn.core.tap import Tap


class LinearContextTransform(nn.Module):
    r"""Rescale each channel by a gate from its average, normalized among the channels of its group.

    .. math::
        y_c = \sigma(w_c \hat{z}_c + b_c)\, x_c, \qquad
        \hat{z}_c = \frac{\bar{x}_c - \mu_{g(c)}}{\sqrt{\sigma_{g(c)}^2 + \epsilon}}

    Args:
        channels: C, the width of the input.
        groups: Into how many groups of neighboring channels C is split.
        eps: Added to the variance.

    Shape:
        - Input: (B, C, H, W), any H and W from 1 up.
        - Output: as the input.

    Map:
        ``tap``, kind channel: (B, C, 1, 1), each value in (0, 1); they do not sum to one.

    Raises:
        ValueError: ``channels`` is below 1, or not a multiple of ``groups``.

    Reference:
        Ruan et al. 2020, "Linear Context Transform Block", https://arxiv.org/abs/1909.03834.
        Differs from: the authors published no code. Here w = 0 and b = 1 at the start, so that
        every gate starts at the same value.

    Example:
        >>> import torch
        >>> LinearContextTransform(12, groups=4)(torch.rand(2, 12, 7, 11)).shape
        torch.Size([2, 12, 7, 11])
    """

    def __init__(self, channels: int, *, groups: int = 16, eps: float = 1e-5):
        super().__init__()
        require_positive(channels=channels)
        require_divisible(channels, groups)
        self.channels, self.groups, self.eps = channels, groups, eps
        self.weight = nn.Parameter(torch.zeros(channels))
        self.bias = nn.Parameter(torch.ones(channels))
        self.gate = nn.Sigmoid()
        self.tap = Tap("channel")

    def forward(self, x: Tensor) -> Tensor:
        require_map(x, self.channels)
        mean = global_mean(x, dtype=wide(x)).unflatten(1, (self.groups, -1))
        normed = F.layer_norm(mean, mean.shape[2:], eps=self.eps).flatten(1)
        gate = self.gate(self.weight * normed + self.bias)
        return scaled(x, self.tap(gate[:, :, None, None].to(x.dtype)))
