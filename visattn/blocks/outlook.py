"""Outlook attention of VOLO: each position hands out the attention of its whole neighborhood."""

import torch.nn.functional as F
from torch import Tensor, nn

from visattn.blocks.parts.check import require_divisible, require_map, require_odd
from visattn.blocks.parts.tokens import like_format
from visattn.core.tap import Tap


class OutlookAttention(nn.Module):
    r"""Let each position compute the attention among its k x k neighbors, and add up what all windows give a position.

    .. math::
        Y^{(p)} = \mathrm{softmax}\bigl(A(x_p) / \sqrt{D}\bigr)\, V^{(p)}, \qquad
        y_i = W_o \sum_{p \ni i} Y^{(p)}_{i - p}

    V^{(p)} are the values of the k^2 neighbors of p and A(x_p) is a k^2 x k^2 matrix linear in x_p:
    no query meets a key. The block stands where a convolution stood.

    Args:
        channels: C.
        kernel_size: k, odd.
        num_heads: H, each of width D = C / H with weights of its own; None is one per 32 channels,
            as in the paper.

    Shape:
        - Input and output: (B, C, H, W).

    Map:
        ``tap``, kind token: (B, heads, N k^2, k^2): for each of the N windows, its k^2 queries by
        its k^2 keys; rows sum to one, keys outside the picture included, whose value is zero.

    Raises:
        ValueError: C is no multiple of ``num_heads``, or the kernel is even.

    Reference:
        Yuan et al. 2021, "VOLO: Vision Outlooker for Visual Recognition",
        https://arxiv.org/abs/2106.13112. Differs from the authors' code in: (B, C, H, W) in and
        out, stride 1, no dropout.

    Example:
        >>> import torch
        >>> OutlookAttention(12)(torch.rand(2, 12, 7, 11)).shape
        torch.Size([2, 12, 7, 11])
    """

    def __init__(self, channels: int, *, kernel_size: int = 3, num_heads: int | None = None):
        super().__init__()
        require_odd(kernel_size=kernel_size)
        num_heads = max(1, channels // 32) if num_heads is None else num_heads
        require_divisible(channels, num_heads, groups_name="num_heads")
        self.channels, self.kernel_size, self.num_heads = channels, kernel_size, num_heads
        self.value = nn.Conv2d(channels, channels, 1, bias=False)
        self.weigh = nn.Conv2d(channels, num_heads * kernel_size**4, 1)
        self.proj = nn.Conv2d(channels, channels, 1)
        self.tap = Tap("token")
        for conv in (self.value, self.weigh, self.proj):
            nn.init.trunc_normal_(conv.weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        require_map(x, self.channels)
        size, area, pad = x.shape[2:], self.kernel_size**2, self.kernel_size // 2
        scale = (self.channels // self.num_heads) ** -0.5
        weights = self.weigh(x).flatten(2).unflatten(1, (self.num_heads, area, area)) * scale
        weights = weights.permute(0, 1, 4, 2, 3).softmax(-1)
        weights = self.tap(weights.flatten(2, 3)).unflatten(2, (-1, area))
        value = F.unfold(self.value(x), self.kernel_size, padding=pad)
        value = value.unflatten(1, (self.num_heads, -1, area)).permute(0, 1, 4, 3, 2)
        y = (weights @ value.to(weights.dtype)).permute(0, 1, 4, 3, 2).flatten(1, 3)
        y = F.fold(y, size, self.kernel_size, padding=pad)
        return like_format(self.proj(like_format(y.to(x.dtype), x)), x)
