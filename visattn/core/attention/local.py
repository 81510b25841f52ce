"""Self-attention where only tokens of one group meet: windows, dilated grids, neighborhoods."""

from torch import Tensor

from visattn.core.attention.full import SelfAttention
from visattn.core.attention.heads import (
    is_row_local,
    merge_heads,
    split_heads,
    split_projections,
)
from visattn.core.layout import Grid, Layout, Neighborhood, Windows
from visattn.core.normalize.definition import Normalizer
from visattn.core.position import grid_coordinates
from visattn.core.position.coordinates import repeat_for_batch
from visattn.core.position.definition import Position
from visattn.core.similarity.definition import Similarity

Pair = tuple[int, int]


def attend_in_groups(
    attention: SelfAttention, x: Tensor, layout: Layout, mask: Tensor | None
) -> Tensor:
    """Apply self-attention among the tokens that the layout lets meet."""
    return attend_folded(attention, x, layout, group_mask(attention, layout, x, mask))


def attend_folded(
    attention: SelfAttention, x: Tensor, layout: Layout, mask: Tensor | None
) -> Tensor:
    """Fold tokens (B, N, C) by the layout, attend under a mask for (B * groups, H, T, Tk)."""
    q, kv = attention.qkv(x).split([attention.dim, 2 * attention.dim], dim=-1)
    # (B, N, C) -> (B * groups, T, C) -> (B * groups, H, T, D)
    q = split_heads(layout.fold(q), attention.num_heads)
    k, v = split_projections(layout.fold_keys(kv), 2, attention.num_heads)
    q = attention.q_norm(q)
    k = attention.k_norm(k)
    bias = None
    if attention.position is not None:
        q, k, bias = attention.position(q, k, layout.coordinates(x.device))
    m = attention.attend(q, k, v, bias=bias, mask=mask, layout=layout)
    return attention.proj(layout.unfold(merge_heads(m)))


def check_token_mask(mask: Tensor, x: Tensor) -> None:
    if mask.shape != x.shape[:2]:
        raise ValueError(
            f"mask must be (B, N) = {tuple(x.shape[:2])} here, over keys; got {tuple(mask.shape)}"
        )


def group_mask(
    attention: SelfAttention, layout: Layout, x: Tensor, mask: Tensor | None
) -> Tensor | None:
    """Join what the layout allows with a mask over tokens (B, N), for (B * groups, H, T, Tk).

    Where rows depend on each other, padding and masked tokens must not act as queries either.
    """
    row_local = is_row_local(attention.attend)
    meets = layout.meets(x.device)  # (groups or 1, 1, T or 1, Tk)
    if meets is not None:
        if not row_local:
            is_token = layout.token_index(x.device) >= 0
            meets = meets & is_token[:, None, :, None]
        meets = repeat_for_batch(meets, x.shape[0] * meets.shape[0])
    if mask is None:
        return meets
    check_token_mask(mask, x)
    allowed = layout.fold_keys(mask[..., None])[:, None, None, :, 0]  # (B * groups, 1, 1, Tk)
    if not row_local:
        allowed = allowed & layout.fold(mask[..., None])[:, None, :, :]
    return allowed if meets is None else meets & allowed


class WindowAttention(SelfAttention):
    r"""Every token attends the tokens of its window.

    .. math::
        y_i = \sum_{j \in \mathrm{window}(i)} \alpha_{ij} v_j\, W_o, \qquad
        \alpha_i = f_{norm}\bigl(f_{sim}(q_i, k_j) + b_{ij}\bigr)

    Args:
        dim: Width of a token.
        num_heads: H; must divide ``dim``.
        similarity: f_sim; None is ScaledDot.
        normalize: f_norm; None is Softmax.
        position: b, such as RelativeTable(head_dim, num_heads, (window_size, window_size)); None
            for none.
        window_size: Side of a window, or (rows, columns).
        qkv_bias: Add a bias to queries, keys and values.
        qk_norm: Normalize queries and keys (LayerNorm per head).

    Shape:
        - x: (B, N, dim) of the grid (rows, columns), N = rows * columns, of any size.
        - mask: bool (B, N) over keys; True may attend.
        - Output: (B, N, dim).

    Map:
        (B * windows, H, T, T) with T tokens in a window; rows of padding mean nothing.

    Raises:
        ValueError: ``num_heads`` does not divide ``dim``; ``window_size`` is below 1; x is not the
            grid's tokens alone.

    Reference:
        Liu et al. 2021, "Swin Transformer", section 3.2, https://arxiv.org/abs/2103.14030.
        Differs from: windows that do not divide the grid hide their padding, which the authors'
        code lets take part; the bias is an option.

    Example:
        >>> import torch
        >>> WindowAttention(12, 3, window_size=4)(torch.rand(2, 35, 12), grid=(5, 7)).shape
        torch.Size([2, 35, 12])
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        *,
        similarity: Similarity | None = None,
        normalize: Normalizer | None = None,
        position: Position | None = None,
        window_size: int | Pair = 7,
        qkv_bias: bool = True,
        qk_norm: bool = False,
    ):
        super().__init__(
            dim,
            num_heads,
            similarity=similarity,
            normalize=normalize,
            position=position,
            qkv_bias=qkv_bias,
            qk_norm=qk_norm,
        )
        self.window_size = _pair("window_size", window_size)

    def forward(self, x: Tensor, *, grid: Pair | None = None, mask: Tensor | None = None) -> Tensor:
        return attend_in_groups(self, x, Windows(require_grid(grid), self.window_size), mask)


class ShiftedWindowAttention(WindowAttention):
    r"""Every token attends the tokens of its window, the windows being moved by half their size.

    .. math::
        y_i = \sum_{j \in \mathrm{window}(i + s)} \alpha_{ij} v_j\, W_o, \qquad s = \lfloor \mathrm{size} / 2 \rfloor

    Windows go around the edge, but tokens from opposite edges do not meet. Where one window covers
    a side of the grid, nothing moves along it.

    Args:
        dim: Width of a token; this and the rest as WindowAttention.

    Shape:
        As WindowAttention.

    Map:
        As WindowAttention; pairs from opposite edges are zero.

    Raises:
        ValueError: As WindowAttention.

    Reference:
        Liu et al. 2021, "Swin Transformer", section 3.2, https://arxiv.org/abs/2103.14030.
        Differs from: as WindowAttention.

    Example:
        >>> import torch
        >>> ShiftedWindowAttention(12, 3, window_size=4)(torch.rand(2, 35, 12), grid=(5, 7)).shape
        torch.Size([2, 35, 12])
    """

    def forward(self, x: Tensor, *, grid: Pair | None = None, mask: Tensor | None = None) -> Tensor:
        shift = (self.window_size[0] // 2, self.window_size[1] // 2)
        return attend_in_groups(self, x, Windows(require_grid(grid), self.window_size, shift), mask)


class GridAttention(WindowAttention):
    r"""Every token attends the tokens of a coarse grid that spans the whole: dilated, global, sparse.

    .. math::
        y_i = \sum_{j \in \mathrm{grid}(i)} \alpha_{ij} v_j\, W_o

    Args:
        dim: Width of a token; this and the rest as WindowAttention, ``window_size`` being the size
            of the coarse grid.

    Shape:
        As WindowAttention.

    Map:
        (B * groups, H, T, T) with T tokens in a coarse grid.

    Raises:
        ValueError: As WindowAttention.

    Reference:
        Tu et al. 2022, "MaxViT: Multi-Axis Vision Transformer", section 3.2,
        https://arxiv.org/abs/2204.01697. Differs from: a grid that is no multiple of the
        coarse one is padded and masked; the relative bias is an option.

    Example:
        >>> import torch
        >>> GridAttention(12, 3, window_size=4)(torch.rand(2, 35, 12), grid=(5, 7)).shape
        torch.Size([2, 35, 12])
    """

    def forward(self, x: Tensor, *, grid: Pair | None = None, mask: Tensor | None = None) -> Tensor:
        return attend_in_groups(self, x, Grid(require_grid(grid), self.window_size), mask)


class NeighborhoodAttention(SelfAttention):
    r"""Every token attends the tokens nearest to it, as many at a border as inside.

    .. math::
        y_i = \sum_{j \in \rho(i)} \alpha_{ij} v_j\, W_o, \qquad |\rho(i)| = k \times k

    Args:
        dim: Width of a token.
        num_heads: H; must divide ``dim``.
        similarity: f_sim; None is ScaledDot.
        normalize: f_norm; None is Softmax.
        position: A bias such as RelativeTable(head_dim, num_heads, (k, k)), or a rotation; None for
            none.
        kernel_size: k, odd, or (rows, columns).
        qkv_bias: Add a bias to queries, keys and values.
        qk_norm: Normalize queries and keys (LayerNorm per head).

    Shape:
        As WindowAttention.

    Map:
        (B * tiles, H, k * k, keys of the tile's region), zero outside a query's neighborhood.

    Raises:
        ValueError: ``kernel_size`` is even or below 1; as WindowAttention.

    Reference:
        Hassani et al. 2023, "Neighborhood Attention Transformer", section 3.1,
        https://arxiv.org/abs/2204.07143.
        Differs from: a grid smaller than the kernel is attended whole, the authors' code refuses
        it; no dilation.

    Example:
        >>> import torch
        >>> NeighborhoodAttention(12, 3, kernel_size=3)(torch.rand(2, 35, 12), grid=(5, 7)).shape
        torch.Size([2, 35, 12])
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        *,
        similarity: Similarity | None = None,
        normalize: Normalizer | None = None,
        position: Position | None = None,
        kernel_size: int | Pair = 7,
        qkv_bias: bool = True,
        qk_norm: bool = False,
    ):
        super().__init__(
            dim,
            num_heads,
            similarity=similarity,
            normalize=normalize,
            position=position,
            qkv_bias=qkv_bias,
            qk_norm=qk_norm,
        )
        self.kernel_size = _pair("kernel_size", kernel_size)
        if any(extent % 2 == 0 for extent in self.kernel_size):
            raise ValueError(f"kernel_size must be odd, so that it has a middle; got {kernel_size}")

    def forward(self, x: Tensor, *, grid: Pair | None = None, mask: Tensor | None = None) -> Tensor:
        return attend_in_groups(self, x, Neighborhood(require_grid(grid), self.kernel_size), mask)


def _pair(name: str, size: int | Pair) -> Pair:
    """Take one number for both sides, refuse what is below one."""
    sides = (size, size) if isinstance(size, int) else tuple(size)
    if len(sides) != 2 or min(sides) < 1:
        raise ValueError(f"{name} must be a positive number, or two; got {size}")
    return sides[0], sides[1]


def require_grid(grid: Pair | None) -> Pair:
    """Refuse to fold without a grid."""
    return grid_coordinates(grid).extent
