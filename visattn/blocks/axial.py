"""Axial attention: along the columns and along the rows."""

from torch import Tensor, nn

from visattn.blocks.parts.check import require_divisible, require_map
from visattn.blocks.parts.tokens import like_format, map_size
from visattn.core.attention.axial import StripAttention


class AxialAttention2d(nn.Module):
    r"""Attend within columns and within rows, and add the two.

    .. math::
        y_{ij} = \sum_l \mathrm{softmax}_l\Bigl(\tfrac{q_{ij}^\top k_{lj}}{\sqrt{D}}\Bigr)
               v_{lj} W_o
               + \sum_l \mathrm{softmax}_l\Bigl(\tfrac{q'^\top_{ij} k'_{il}}{\sqrt{D}}\Bigr)
               v'_{il} W'_o

    Args:
        channels: C.
        num_heads: H, each of width D = C / H.

    Shape:
        - Input and output: (B, C, H, W).

    Map:
        ``height.attend`` and ``width.attend``, kind token: (B W, heads, H, H) and (B H, heads, W,
        W), columns and rows folded into the batch; rows sum to one.

    Raises:
        ValueError: C is no multiple of ``num_heads``.

    Reference:
        Ho et al. 2019, "Axial Attention in Multidimensional Transformers", section 3,
        https://arxiv.org/abs/1912.12180.
        Differs from the paper in: the two axes are added, as in the well-known port
        (lucidrains/axial-attention), not one after the other in blocks of their own.

    Example:
        >>> import torch
        >>> AxialAttention2d(12)(torch.rand(2, 12, 7, 11)).shape
        torch.Size([2, 12, 7, 11])
    """

    def __init__(self, channels: int, *, num_heads: int = 4):
        super().__init__()
        require_divisible(channels, num_heads, groups_name="num_heads")
        self.channels = channels
        self.height = StripAttention(channels, num_heads, axis="height", qkv_bias=False)
        self.width = StripAttention(channels, num_heads, axis="width", qkv_bias=False)

    def forward(self, x: Tensor) -> Tensor:
        require_map(x, self.channels)
        grid = map_size(x)
        tokens = x.flatten(2).transpose(1, 2)  # (B, C, H, W) -> (B, N, C)
        y = self.height(tokens, grid=grid)
        y = y + self.width(tokens, grid=grid)
        y = y.transpose(1, 2).unflatten(2, grid)  # (B, N, C) -> (B, C, H, W)
        return like_format(y.to(x.dtype), x)
