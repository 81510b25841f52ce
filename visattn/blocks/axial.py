"""Axial attention: along the columns, then along the rows."""

from torch import Tensor, nn

from visattn.blocks.parts.check import require_divisible, require_map
from visattn.blocks.parts.tokens import like_format
from visattn.core.formula import Attend
from visattn.core.layout import strips


class AxialAttention2d(nn.Module):
    r"""Attend along each axis on its own and add up what comes back.

    .. math::
        y_{ij} = \sum_l \mathrm{softmax}_l\Bigl(\tfrac{q_{ij}^\top k_{lj}}{\sqrt{D}}\Bigr) v_{lj} W_o
               + \sum_l \mathrm{softmax}_l\Bigl(\tfrac{q'^\top_{ij} k'_{il}}{\sqrt{D}}\Bigr) v'_{il} W'_o

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
        self.height = StripAttention(channels, num_heads, axis="height")
        self.width = StripAttention(channels, num_heads, axis="width")

    def forward(self, x: Tensor) -> Tensor:
        require_map(x, self.channels)
        return like_format((self.height(x) + self.width(x)).to(x.dtype), x)


class StripAttention(nn.Module):
    r"""Self-attention within every column or every row.

    .. math::
        y = \mathrm{softmax}(q k^\top / \sqrt{D})\, v\, W_o + b, \qquad [q, k, v] = x W

    Args:
        channels: C.
        num_heads: H.
        axis: ``"height"``: within columns, or ``"width"``: within rows.

    Shape:
        - Input and output: (B, C, H, W).

    Map:
        ``attend``, kind token; rows sum to one.

    Reference:
        Ho et al. 2019, https://arxiv.org/abs/1912.12180. Differs from: nothing.

    Example:
        >>> import torch
        >>> StripAttention(12, 3, axis="height")(torch.rand(2, 12, 7, 11)).shape
        torch.Size([2, 12, 7, 11])
    """

    def __init__(self, channels: int, num_heads: int, *, axis: str):
        super().__init__()
        self.num_heads, self.axis = num_heads, axis
        self.qkv = nn.Linear(channels, 3 * channels, bias=False)
        self.attend = Attend()
        self.proj = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        layout = strips(tuple(x.shape[2:]), self.axis)
        tokens = layout.fold(self.qkv(x.flatten(2).transpose(1, 2)))
        q, k, v = tokens.unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        m = self.attend(q, k, v, layout=layout).transpose(1, 2).flatten(2)
        return self.proj(layout.unfold(m)).transpose(1, 2).unflatten(2, x.shape[2:])
