"""Selective kernel: convolutions of several extents, and a softmax over them for every channel."""

import torch
from torch import Tensor, nn

from visattn.blocks.parts.check import (
    hidden_width,
    require_divisible,
    require_map,
    require_positive,
)
from visattn.blocks.parts.norm import make_norm
from visattn.blocks.parts.pool import global_mean
from visattn.core.tap import Tap


class SelectiveKernel(nn.Module):
    r"""Convolve with kernels of growing dilation and let every channel choose among them.

    .. math::
        y_c = \sum_k a_{kc}\, U_{kc}, \qquad
        a_{\cdot c} = \mathrm{softmax}_k(A z)_c, \qquad
        z = \mathrm{ReLU}\bigl(\mathrm{BN}(W \textstyle\sum_k \bar{U}_k)\bigr)

    U_k is a grouped 3 x 3 convolution of dilation k = 1, 2, ..., then batch norm and ReLU; the bar
    is the mean over positions. The block stands where a 3 x 3 convolution stood.

    Args:
        channels: C.
        num_branches: Number of kernels; dilation 2 stands for 5 x 5.
        groups: Groups of every convolution.
        reduction: r, so the hidden width is ``max(min_width, C // r)``.
        min_width: L.
        norm: After the convolutions and in the hidden layer.

    Shape:
        - Input and output: (B, C, H, W).

    Map:
        ``tap``, kind branch: (B, num_branches, C, 1, 1); sums to one over the branches.

    Raises:
        ValueError: C is no multiple of ``groups``, a size is below 1, or batch norm trains on one
            image.

    Reference:
        Li, Wang, Hu, Yang 2019, "Selective Kernel Networks", https://arxiv.org/abs/1903.06586.
        Differs from timm's in: timm gives each branch its share of the input by default
        (``split_input=True``), the paper all of it.

    Example:
        >>> SelectiveKernel(12, groups=4).eval()(torch.rand(2, 12, 7, 11)).shape
        torch.Size([2, 12, 7, 11])
    """

    def __init__(
        self,
        channels: int,
        *,
        num_branches: int = 2,
        groups: int = 32,
        reduction: int = 16,
        min_width: int = 32,
        norm: str = "batch",
    ):
        super().__init__()
        hidden = hidden_width(channels, reduction, at_least=min_width)
        require_positive(num_branches=num_branches, min_width=min_width)
        require_divisible(channels, groups)
        self.channels, self.num_branches = channels, num_branches
        self.branches = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(channels, channels, 3, padding=d, dilation=d, groups=groups, bias=False),
                make_norm(norm, channels),
                nn.ReLU(),
            )
            for d in range(1, num_branches + 1)
        )
        self.fc1 = nn.Linear(channels, hidden, bias=False)
        self.norm = make_norm(norm, hidden)
        self.act = nn.ReLU()
        self.fc2 = nn.Linear(hidden, num_branches * channels, bias=False)
        self.tap = Tap("branch")

    def forward(self, x: Tensor) -> Tensor:
        require_map(x, self.channels)
        maps = [branch(x) for branch in self.branches]
        mean = sum(global_mean(u) for u in maps)
        hidden = self.act(self.norm(self.fc1(mean)[:, :, None, None]))[:, :, 0, 0]
        weights = self.fc2(hidden).unflatten(1, (self.num_branches, -1)).softmax(1)
        weights = self.tap(weights[..., None, None])
        y = weights[:, 0] * maps[0]
        for k in range(1, self.num_branches):
            y = torch.addcmul(y, weights[:, k], maps[k])
        return y.to(x.dtype)
