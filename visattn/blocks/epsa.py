"""Pyramid squeeze attention of EPSANet: convolutions of growing extent, weighed against each other."""

import torch
from torch import Tensor, nn

from visattn.blocks.parts.check import hidden_width, require_divisible, require_map, require_odd
from visattn.blocks.parts.pool import global_mean
from visattn.blocks.parts.tokens import like_format
from visattn.core.tap import Tap


class PyramidSqueezeAttention(nn.Module):
    r"""Give each quarter of the output a kernel of its own extent, weighed by a shared squeeze-and-excitation.

    .. math::
        y = \bigl[a_1 \odot F_1, \dots, a_S \odot F_S\bigr], \qquad F_i = W_i *_{k_i} x, \qquad
        a_{\cdot c} = \mathrm{softmax}_i\bigl(\mathrm{SE}(F_i)_c\bigr)

    The block stands where a 3 x 3 convolution stood.

    Args:
        channels: C; each of the S branches gives C / S of them.
        kernel_sizes: Extent of each branch, odd.
        groups: Groups of each branch's convolution.
        reduction: r of the squeeze-and-excitation on C / S channels.
        descending: Put the branch with the largest kernel first.

    Shape:
        - Input and output: (B, C, H, W).

    Map:
        ``tap``, kind branch: (B, S, C / S, 1, 1) in the order of ``kernel_sizes``; sums to one over
        the branches.

    Raises:
        ValueError: A kernel is even, the lists differ in length, or C or C / S is no multiple of
            the groups.

    Reference:
        Zhang et al. 2021, "EPSANet: An Efficient Pyramid Squeeze Attention Block on Convolutional
        Neural Network", https://arxiv.org/abs/2105.14447. Differs from the authors' code in: their
        loop puts the branches in reverse order (``descending=True``), which weights trained with it
        need.

    Example:
        >>> PyramidSqueezeAttention(64)(torch.rand(2, 64, 7, 11)).shape
        torch.Size([2, 64, 7, 11])
    """

    def __init__(
        self,
        channels: int,
        *,
        kernel_sizes: tuple[int, ...] = (3, 5, 7, 9),
        groups: tuple[int, ...] = (1, 4, 8, 16),
        reduction: int = 16,
        descending: bool = False,
    ):
        super().__init__()
        if len(kernel_sizes) != len(groups):
            raise ValueError(
                f"groups must give one number per kernel; got {len(groups)} for {len(kernel_sizes)} kernels"
            )
        width = channels // len(kernel_sizes)
        for size, group in zip(kernel_sizes, groups, strict=True):
            require_odd(kernel_sizes=size)
            require_divisible(
                channels, len(kernel_sizes) * group, groups_name="kernels times groups"
            )
        self.channels, self.descending = channels, descending
        self.convs = nn.ModuleList(
            nn.Conv2d(channels, width, size, padding=size // 2, groups=group, bias=False)
            for size, group in zip(kernel_sizes, groups, strict=True)
        )
        hidden = hidden_width(width, reduction)
        self.fc1 = nn.Linear(width, hidden)
        self.act = nn.ReLU()
        self.fc2 = nn.Linear(hidden, width)
        self.tap = Tap("branch")

    def forward(self, x: Tensor) -> Tensor:
        require_map(x, self.channels)
        maps = [conv(x) for conv in self.convs]
        means = torch.stack([global_mean(f) for f in maps], 1)
        gates = self.fc2(self.act(self.fc1(means))).sigmoid()
        weights = self.tap(gates.softmax(1)[..., None, None])
        parts = [weights[:, i] * f for i, f in enumerate(maps)]
        return like_format(torch.cat(parts[::-1] if self.descending else parts, 1).to(x.dtype), x)
