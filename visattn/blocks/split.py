"""Split attention of ResNeSt: a grouped convolution whose splits are weighed against each other, channel by channel."""

import torch
from torch import Tensor, nn

from visattn.blocks.parts.check import hidden_width, require_divisible, require_map, require_odd
from visattn.blocks.parts.norm import make_norm
from visattn.blocks.parts.pool import axis_mean
from visattn.core.tap import Tap


class SplitAttention(nn.Module):
    r"""Convolve into several splits and sum them with weights that sum to one for every channel.

    .. math::
        y_c = \sum_r a_{rc}\, U_{rc}, \qquad
        a_{\cdot c} = \mathrm{softmax}_r(W_2 z)_c, \qquad
        z = \mathrm{ReLU}\bigl(\mathrm{BN}(W_1 \textstyle\sum_r \bar{U}_r)\bigr)

    U are the splits of one convolution to radix C channels, split-major; the bar is the mean over
    positions. W_1 and W_2 act within each of ``groups`` cardinal groups. The block stands where a
    convolution stood.

    Args:
        channels: C.
        radix: Number of splits, 2 or more.
        groups: Cardinality.
        reduction: r, so the hidden width is ``max(min_width, radix C // r)``.
        min_width: Smallest hidden width.
        kernel_size: Extent of the convolution, odd.
        norm: After the convolution and in the hidden layer.

    Shape:
        - Input and output: (B, C, H, W).

    Map:
        ``tap``, kind branch: (B, radix, C, 1, 1); sums to one over the splits.

    Raises:
        ValueError: ``radix`` is below 2, C or the hidden width is no multiple of ``groups``, the
            kernel is even, or batch norm trains on one image.

    Reference:
        Zhang et al. 2020, "ResNeSt: Split-Attention Networks", https://arxiv.org/abs/2004.08955.
        Differs from the authors' code in: a radix of 1, where the softmax becomes a sigmoid, is
        refused (that is squeeze-and-excitation).

    Example:
        >>> SplitAttention(12).eval()(torch.rand(2, 12, 7, 11)).shape
        torch.Size([2, 12, 7, 11])
    """

    def __init__(
        self,
        channels: int,
        *,
        radix: int = 2,
        groups: int = 1,
        reduction: int = 4,
        min_width: int = 32,
        kernel_size: int = 3,
        norm: str = "batch",
    ):
        super().__init__()
        if radix < 2:
            raise ValueError(f"radix must be 2 or more; got {radix}")
        require_odd(kernel_size=kernel_size)
        hidden = hidden_width(channels * radix, reduction, at_least=min_width)
        require_divisible(channels, groups * radix, groups_name="groups * radix")
        if hidden % groups:
            raise ValueError(
                f"the hidden width must be a multiple of groups; got {hidden} and {groups}"
            )
        self.channels, self.radix, self.groups = channels, radix, groups
        wide = channels * radix
        self.conv = nn.Conv2d(
            channels, wide, kernel_size, padding=kernel_size // 2, groups=groups * radix, bias=False
        )
        self.norm = make_norm(norm, wide)
        self.act = nn.ReLU()
        self.fc1 = nn.Conv2d(channels, hidden, 1, groups=groups)
        self.hidden_norm = make_norm(norm, hidden)
        self.fc2 = nn.Conv2d(hidden, wide, 1, groups=groups)
        self.tap = Tap("branch")

    def forward(self, x: Tensor) -> Tensor:
        require_map(x, self.channels)
        maps = self.act(self.norm(self.conv(x))).unflatten(1, (self.radix, self.channels))
        total = axis_mean(maps, (3, 4)).sum(1)
        logits = self.fc2(self.act(self.hidden_norm(self.fc1(total))))
        # The logits lie group by group and split by split; the splits of the maps come first.
        weights = (
            logits.unflatten(1, (self.groups, self.radix, -1))
            .softmax(2)
            .transpose(1, 2)
            .flatten(2, 3)
        )
        weights = self.tap(weights)
        y = weights[:, 0] * maps[:, 0]
        for r in range(1, self.radix):
            y = torch.addcmul(y, weights[:, r], maps[:, r])
        return y.to(x.dtype)
