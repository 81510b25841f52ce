"""Outlook attention of VOLO: each position predicts the attention within its neighborhood."""

import torch.nn.functional as F
from torch import Tensor, nn

from visattn.blocks.parts.check import require_divisible, require_map, require_odd
from visattn.blocks.parts.tokens import like_format, map_size
from visattn.core.tap import Tap


class OutlookAttention(nn.Module):
    r"""Predict the attention among the k x k neighbors of each position; add up the windows.

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

    def __init__(
        self,
        channels: int,
        *,
        kernel_size: int = 3,
        num_heads: int | None = None,
    ):
        super().__init__()
        require_odd(kernel_size=kernel_size)
        if num_heads is None:
            num_heads = max(1, channels // 32)
        require_divisible(channels, num_heads, groups_name="num_heads")
        self.channels = channels
        self.kernel_size = kernel_size
        self.num_heads = num_heads
        self.value = nn.Conv2d(channels, channels, 1, bias=False)
        self.weigh = nn.Conv2d(channels, num_heads * kernel_size**4, 1)
        self.proj = nn.Conv2d(channels, channels, 1)
        self.tap = Tap("token")
        for conv in (self.value, self.weigh, self.proj):
            nn.init.trunc_normal_(conv.weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        require_map(x, self.channels)
        weights = self._weigh_neighbors(x)
        padding = self.kernel_size // 2
        value = F.unfold(self.value(x), self.kernel_size, padding=padding)
        # (B, C k^2, N) -> (B, heads, D, k^2, N) -> (B, heads, N, k^2, D)
        value = value.unflatten(1, (self.num_heads, -1, self.kernel_size**2))
        value = value.permute(0, 1, 4, 3, 2)
        m = weights @ value.to(weights.dtype)
        # (B, heads, N, k^2, D) -> (B, C k^2, N) -> (B, C, H, W), where windows overlap added up
        y = m.permute(0, 1, 4, 3, 2).flatten(1, 3)
        y = F.fold(y, map_size(x), self.kernel_size, padding=padding)
        # The fold forgets the memory format, and the convolution works in that of its input.
        y = like_format(y.to(x.dtype), x)
        return like_format(self.proj(y), x)

    def _weigh_neighbors(self, x: Tensor) -> Tensor:
        """Return the attention of every window, (B, heads, N, k^2 queries, k^2 keys)."""
        area = self.kernel_size**2
        head_dim = self.channels // self.num_heads
        # (B, heads k^4, H, W) -> (B, heads, k^2, k^2, N) -> (B, heads, N, k^2, k^2)
        scores = self.weigh(x).flatten(2)
        scores = scores.unflatten(1, (self.num_heads, area, area))
        scores = scores * head_dim**-0.5
        weights = scores.permute(0, 1, 4, 2, 3).softmax(-1)
        # The map has the queries of all windows in one axis: (B, heads, N k^2, k^2)
        alpha = self.tap(weights.flatten(2, 3))
        return alpha.unflatten(2, (-1, area))
