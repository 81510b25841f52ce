"""Cross-covariance attention: channels attend channels by their cosine over the positions."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visattn.blocks.parts.check import require_divisible, require_map
from visattn.blocks.parts.tokens import like_format, to_channels, to_map
from visattn.core.formula import Attend
from visattn.core.layout import Channels
from visattn.core.normalize.exponential import Softmax
from visattn.core.similarity.product import Dot


class CrossCovarianceAttention(nn.Module):
    r"""Let the channels of a head attend each other by the cosine of their maps.

    .. math::
        y^\top = W_o\, \mathrm{softmax}\bigl(\tau_h\, \hat{q}^\top \hat{k}\bigr)\, v^\top, \qquad
        \hat{q} = q / \lVert q \rVert_2 \text{ over the positions}

    Args:
        channels: C.
        num_heads: H, each of C / H channels.
        qkv_bias: Add a bias to queries, keys and values.

    Shape:
        - Input and output: (B, C, H, W).

    Map:
        ``attend``, kind channel: (B, heads, C / heads, C / heads), channels by channels; rows sum
        to one.

    Raises:
        ValueError: C is no multiple of ``num_heads``.

    Reference:
        El-Nouby et al. 2021, "XCiT: Cross-Covariance Image Transformers",
        https://arxiv.org/abs/2106.09681. The paper divides by tau, the authors' code multiplies by
        it, and so does this. Differs from: (B, C, H, W) in and out.

    Example:
        >>> CrossCovarianceAttention(12)(torch.rand(2, 12, 7, 11)).shape
        torch.Size([2, 12, 7, 11])
    """

    def __init__(
        self,
        channels: int,
        *,
        num_heads: int = 4,
        qkv_bias: bool = False,
    ):
        super().__init__()
        require_divisible(channels, num_heads, groups_name="num_heads")
        self.channels = channels
        self.num_heads = num_heads
        self.qkv = nn.Conv2d(channels, 3 * channels, 1, bias=qkv_bias)
        self.temperature = nn.Parameter(torch.ones(num_heads, 1, 1))
        # The D x D matrix is small compared to the map.
        self.attend = Attend(Dot(1), Softmax(num_heads), impl="dense")
        self.proj = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        require_map(x, self.channels)
        layout = Channels()
        # (B, 3 C, H, W) -> 3 x (B, heads, D, N)
        maps = self.qkv(x).chunk(3, 1)
        q, k, v = (to_channels(y, self.num_heads) for y in maps)
        # The inner product of unit vectors is the cosine.
        q = F.normalize(q, dim=-1)
        k = F.normalize(k, dim=-1)
        q = q * self.temperature.to(q.dtype)
        m = self.attend(q, k, v, layout=layout)
        y = to_map(layout.unfold(m), x)
        return like_format(self.proj(y.to(x.dtype)), x)
