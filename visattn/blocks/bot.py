"""Multi-head self-attention of BoTNet, with relative positions."""

from torch import Tensor, nn

from visattn.blocks.parts.check import require_divisible, require_map
from visattn.blocks.parts.tokens import map_size, to_map, to_tokens
from visattn.core.formula import Attend
from visattn.core.normalize.exponential import Softmax
from visattn.core.position.coordinates import grid_coordinates
from visattn.core.position.decomposed import Decomposed


class BottleneckAttention(nn.Module):
    r"""Self-attention with relative positions in place of a 3 x 3 convolution.

    .. math::
        y_i = \sum_j \mathrm{softmax}_j\Bigl(\tfrac{q_i^\top k_j}{\sqrt{D}}
              + q_i^\top r^y_{y_i - y_j} + q_i^\top r^x_{x_i - x_j}\Bigr)\, v_j

    Args:
        channels: C.
        num_heads: H, each of width D = C / H.
        grid: (rows, columns) of the map that the learned vectors are for, one per offset; they
            are interpolated for other maps.

    Shape:
        - Input and output: (B, C, H, W).

    Map:
        ``attend``, kind token: (B, heads, N, N); rows sum to one.

    Raises:
        ValueError: C is no multiple of ``num_heads``, or ``grid`` is below 1.

    Reference:
        Srinivas et al. 2021, "Bottleneck Transformers for Visual Recognition",
        https://arxiv.org/abs/2101.11605.
        Differs from the paper in: q is not scaled in the terms of the positions, as in timm; maps
        of any size.

    Example:
        >>> import torch
        >>> BottleneckAttention(12)(torch.rand(2, 12, 7, 11)).shape
        torch.Size([2, 12, 7, 11])
    """

    def __init__(
        self,
        channels: int,
        *,
        num_heads: int = 4,
        grid: tuple[int, int] = (14, 14),
    ):
        super().__init__()
        require_divisible(channels, num_heads, groups_name="num_heads")
        self.channels = channels
        self.num_heads = num_heads
        head_dim = channels // num_heads
        self.qkv = nn.Conv2d(channels, 3 * channels, 1, bias=False)
        self.position = Decomposed(head_dim, num_heads, grid)
        self.attend = Attend(self.position.widen(None), Softmax(num_heads))

    def forward(self, x: Tensor) -> Tensor:
        require_map(x, self.channels)
        # (B, 3 C, H, W) -> 3 x (B, heads, N, D)
        maps = self.qkv(x).chunk(3, 1)
        q, k, v = (to_tokens(y, self.num_heads) for y in maps)
        # The positions lengthen q and k, so that their product has the terms r.
        coordinates = grid_coordinates(map_size(x), x.device)
        q, k, _ = self.position(q, k, coordinates)
        m = self.attend(q, k, v)
        return to_map(m, x).to(x.dtype)
