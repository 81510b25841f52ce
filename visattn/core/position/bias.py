"""Positions as biases of the scores that depend on the offset from query to key alone."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from visattn.core.position.coordinates import Coordinates, pad_prefix, repeat_for_batch
from visattn.core.position.definition import Position

Pair = tuple[int, int]


class Alibi(Position):
    r"""Lower a score in proportion to the distance on the grid, each head at its own rate: 2D ALiBi.

    .. math::
        b_{hij} = -m_h \sqrt{(y_i - y_j)^2 + (x_i - x_j)^2}, \qquad m_h = 2^{-8 h / H},\; h = 1 \dots H

    Args:
        head_dim: Without effect.
        num_heads: H.
        grid: Without effect: distances follow from the coordinates of each call.

    Shape:
        - Input: q (B, H, Nq, D), k (B, H, Nk, D) and their Coordinates.
        - Output: q, k untouched, and the bias, broadcastable to (B, H, Nq, Nk); zero for tokens
          without a place.

    Map:
        None: it changes the scores.

    Raises:
        ValueError: ``num_heads`` is below 1.

    Reference:
        Press et al. 2021, "Train Short, Test Long" (ALiBi), section 3,
        https://arxiv.org/abs/2108.12409. Differs from: the distance is the Euclidean one between
        tokens, the paper's is one of positions in a text and looks back only; the slopes are the
        paper's geometric sequence for every number of heads, not only for powers of two.

    Example:
        >>> from visattn.core.position import grid_coordinates
        >>> q = torch.rand(1, 1, 2, 3)
        >>> 256 * Alibi(3)(q, q, grid_coordinates((1, 2)))[2]
        tensor([[[[-0., -1.],
                  [-1., -0.]]]])
    """

    def __init__(self, head_dim: int, num_heads: int = 1, grid: Pair | None = None):
        super().__init__()
        if num_heads < 1:
            raise ValueError(f"num_heads must be at least 1; got {num_heads}")
        self.num_heads = num_heads

    def forward(
        self, q: Tensor, k: Tensor, coordinates: Coordinates
    ) -> tuple[Tensor, Tensor, Tensor]:
        exact = torch.promote_types(q.dtype, torch.float32)
        head = torch.arange(1, self.num_heads + 1, device=q.device, dtype=exact)
        slope = 2 ** (-8 * head / self.num_heads)  # (H,)
        offset = coordinates.queries[:, :, None] - coordinates.keys[:, None]  # (G, Nq, Nk, 2)
        distance = offset.to(exact).square().sum(-1).sqrt()[:, None]  # (G, 1, Nq, Nk)
        bias = -slope[:, None, None] * distance
        return q, k, _fit_to_batch(bias, q, k)


class RelativeTable(Position):
    r"""Add a learned number for every offset and head to the scores.

    .. math::
        b_{hij} = T_{h,\; y_i - y_j,\; x_i - x_j}

    Where tokens further apart than in ``grid`` meet, the table is stretched to their offsets
    (bicubic).

    Args:
        head_dim: Without effect.
        num_heads: H.
        grid: Rows and columns whose offsets the table holds: a window, a kernel, a whole grid.

    Shape:
        - Input: q (B, H, Nq, D), k (B, H, Nk, D) and their Coordinates.
        - Output: q, k untouched, and the bias, broadcastable to (B, H, Nq, Nk); zero for tokens
          without a place.

    Map:
        None: it changes the scores.

    Raises:
        ValueError: ``grid`` is missing or below 1.

    Reference:
        Liu et al. 2021, "Swin Transformer", eq. 4, https://arxiv.org/abs/2103.14030. Differs from:
        tokens without a place and the stretching, which the paper has not.

    Example:
        >>> from visattn.core.position import grid_coordinates
        >>> q = torch.rand(2, 3, 35, 4)
        >>> RelativeTable(4, 3, (5, 7))(q, q, grid_coordinates((5, 7)))[2].shape
        torch.Size([1, 3, 35, 35])
    """

    def __init__(self, head_dim: int, num_heads: int = 1, grid: Pair | None = None):
        super().__init__()
        self.grid = require_grid(grid)
        shape = (num_heads, 2 * self.grid[0] - 1, 2 * self.grid[1] - 1)
        self.table = nn.Parameter(nn.init.trunc_normal_(torch.empty(shape), std=0.02))

    def forward(
        self, q: Tensor, k: Tensor, coordinates: Coordinates
    ) -> tuple[Tensor, Tensor, Tensor]:
        reach = (
            max(coordinates.reach[0], self.grid[0]),
            max(coordinates.reach[1], self.grid[1]),
        )
        table: Tensor = self.table
        if reach != self.grid:
            size = (2 * reach[0] - 1, 2 * reach[1] - 1)
            table = F.interpolate(table[None], size=size, mode="bicubic", align_corners=False)[0]
        return q, k, _fit_to_batch(by_offset(table, reach, coordinates), q, k)


class LogCpb(Position):
    r"""Let a small network say the bias of every offset, from the logarithm of the offset.

    .. math::
        b_{hij} = 16\,\sigma\bigl(W_2\,\mathrm{ReLU}(W_1 [\lambda(y_i - y_j), \lambda(x_i - x_j)] + c)\bigr)_h,
        \qquad \lambda(d) = \mathrm{sign}(d)\, \log_8(1 + 8 |d| / (g - 1))

    Args:
        head_dim: Without effect.
        num_heads: H.
        grid: g, the rows and columns of the window that offsets are measured by; larger ones are
            extrapolated.
        hidden: Width of the network.

    Shape:
        - Input: q (B, H, Nq, D), k (B, H, Nk, D) and their Coordinates.
        - Output: q, k untouched, and the bias in (0, 16), broadcastable to (B, H, Nq, Nk); zero for
          tokens without a place.

    Map:
        None: it changes the scores.

    Raises:
        ValueError: ``grid`` is missing or below 1.

    Reference:
        Liu et al. 2021, "Swin Transformer V2", section 3.3, https://arxiv.org/abs/2111.09883; the
        factors 8 and 16 are those of the authors' code. Differs from: nothing.

    Example:
        >>> from visattn.core.position import grid_coordinates
        >>> q = torch.rand(2, 3, 35, 4)
        >>> LogCpb(4, 3, (5, 7))(q, q, grid_coordinates((5, 7)))[2].shape
        torch.Size([1, 3, 35, 35])
    """

    def __init__(
        self, head_dim: int, num_heads: int = 1, grid: Pair | None = None, *, hidden: int = 512
    ):
        super().__init__()
        self.grid = require_grid(grid)
        self.mlp = nn.Sequential(
            nn.Linear(2, hidden), nn.ReLU(), nn.Linear(hidden, num_heads, bias=False)
        )

    def forward(
        self, q: Tensor, k: Tensor, coordinates: Coordinates
    ) -> tuple[Tensor, Tensor, Tensor]:
        weight = next(self.mlp.parameters())
        axes = []
        for reach, size in zip(coordinates.reach, self.grid, strict=True):
            offset = torch.arange(1 - reach, reach, device=weight.device, dtype=weight.dtype)
            offset = offset * 8 / max(size - 1, 1)
            axes.append(offset.sign() * torch.log2(offset.abs() + 1) / 3)
        offsets = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1)  # (rows, columns, 2)
        table = 16 * self.mlp(offsets).sigmoid().permute(2, 0, 1)  # (H, rows, columns)
        return q, k, _fit_to_batch(by_offset(table, coordinates.reach, coordinates), q, k)


def _fit_to_batch(bias: Tensor, q: Tensor, k: Tensor) -> Tensor:
    """Give a bias (G, H, n, m) zeros for the prefix tokens, the batch and the dtype of q."""
    return repeat_for_batch(pad_prefix(bias.to(q.dtype), q.shape[2], k.shape[2]), q.shape[0])


def by_offset(table: Tensor, reach: Pair, coordinates: Coordinates) -> Tensor:
    """Read a table (H, 2 rows - 1, 2 columns - 1) of offsets as a bias (G, H, Nq, Nk).

    Offsets beyond the reach belong to pairs that a mask keeps apart; they read the edge.
    """
    offset = coordinates.queries[:, :, None] - coordinates.keys[:, None]  # (G, Nq, Nk, 2)
    row = offset[..., 0].clamp(1 - reach[0], reach[0] - 1) + reach[0] - 1
    column = offset[..., 1].clamp(1 - reach[1], reach[1] - 1) + reach[1] - 1
    return table[:, row, column].transpose(0, 1)


def require_grid(grid: Pair | None) -> Pair:
    """Refuse a table without a size."""
    if grid is None or len(grid) != 2 or min(grid) < 1:
        raise ValueError(
            f"grid must be (rows, columns) of the tokens that meet, each at least 1; got {grid}"
        )
    return grid[0], grid[1]
