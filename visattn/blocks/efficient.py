"""Efficient attention: keys pool the values into contexts first, at linear cost."""

from torch import Tensor, nn

from visattn.blocks.parts.check import hidden_width, require_divisible, require_map
from visattn.blocks.parts.tokens import project_back, project_tokens
from visattn.core.formula import Attend
from visattn.core.normalize.linear import L1
from visattn.core.similarity.features import Efficient


class EfficientAttention(nn.Module):
    r"""Add to each position a mixture of global contexts, at a cost linear in N.

    .. math::
        y = x + W_o\, \bigl[\rho_q(Q)\,(\rho_k(K)^\top V)\bigr], \qquad
        \rho_q = \mathrm{softmax}_d, \quad \rho_k = \mathrm{softmax}_n

    Args:
        channels: C.
        reduction: r, so keys and values have C // r channels.
        num_heads: H.

    Shape:
        - Input and output: (B, C, H, W).

    Map:
        ``attend``, kind token: (B, heads, N, N), the product of the two softmaxes; rows sum to one.

    Raises:
        ValueError: C is no multiple of r times ``num_heads``.

    Reference:
        Shen et al. 2021, "Efficient Attention: Attention with Linear Complexities",
        https://arxiv.org/abs/1812.01243. Differs from: nothing.

    Example:
        >>> import torch
        >>> EfficientAttention(16, num_heads=4)(torch.rand(2, 16, 7, 11)).shape
        torch.Size([2, 16, 7, 11])
    """

    def __init__(
        self,
        channels: int,
        *,
        reduction: int = 2,
        num_heads: int = 1,
    ):
        super().__init__()
        inner = hidden_width(channels, reduction)
        require_divisible(channels, reduction * num_heads, groups_name="reduction * num_heads")
        self.channels = channels
        self.num_heads = num_heads
        self.query = nn.Conv2d(channels, inner, 1)
        self.key = nn.Conv2d(channels, inner, 1)
        self.value = nn.Conv2d(channels, inner, 1)
        self.attend = Attend(Efficient(inner // num_heads, num_heads), L1(num_heads))
        self.proj = nn.Conv2d(inner, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        require_map(x, self.channels)
        q, k, v = project_tokens(
            x,
            self.query,
            self.key,
            self.value,
            num_heads=self.num_heads,
        )
        m = self.attend(q, k, v)  # (B, heads, N, D)
        return x + project_back(m, self.proj, x).to(x.dtype)
