"""Self-attention along rows and columns: strips, one axis after the other, and the criss-cross."""

from copy import deepcopy

from torch import Tensor, nn

from visattn.core.attention.criss_cross import CrissCrossAttend
from visattn.core.attention.full import SelfAttention
from visattn.core.attention.heads import token_mask
from visattn.core.attention.local import (
    Pair,
    attend_folded,
    attend_in_groups,
    check_token_mask,
    require_grid,
)
from visattn.core.layout import CrissCross, strips
from visattn.core.normalize.definition import Normalizer
from visattn.core.position.definition import Position
from visattn.core.similarity.definition import Similarity


class StripAttention(SelfAttention):
    r"""Every token attends the tokens of its row, or of its column.

    .. math::
        y_{ij} = \sum_{t} \alpha_{ij,it} v_{it}\, W_o \quad \text{(width)}, \qquad
        y_{ij} = \sum_{t} \alpha_{ij,tj} v_{tj}\, W_o \quad \text{(height)}

    Args:
        dim: Width of a token.
        num_heads: H; must divide ``dim``.
        axis: ``"width"`` for rows, ``"height"`` for columns.
        similarity: f_sim; None is ScaledDot.
        normalize: f_norm; None is Softmax.
        position: A rotation or bias of ``visattn.core.position``; None for none.
        qkv_bias: Add a bias to queries, keys and values.

    Shape:
        As WindowAttention.

    Map:
        (B * rows, H, columns, columns), or the other way round; rows sum to one where the
        normalizer says so.

    Raises:
        ValueError: ``axis`` is neither; as WindowAttention.

    Reference:
        Ho et al. 2019, "Axial Attention in Multidimensional Transformers",
        https://arxiv.org/abs/1912.12180. Differs
        from: nothing.

    Example:
        >>> import torch
        >>> StripAttention(12, 3, axis="width")(torch.rand(2, 35, 12), grid=(5, 7)).shape
        torch.Size([2, 35, 12])
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        *,
        axis: str,
        similarity: Similarity | None = None,
        normalize: Normalizer | None = None,
        position: Position | None = None,
        qkv_bias: bool = True,
    ):
        super().__init__(
            dim,
            num_heads,
            similarity=similarity,
            normalize=normalize,
            position=position,
            qkv_bias=qkv_bias,
        )
        if axis not in ("height", "width"):
            raise ValueError(f"axis must be 'height' or 'width'; got {axis!r}")
        self.axis = axis

    def forward(self, x: Tensor, *, grid: Pair | None = None, mask: Tensor | None = None) -> Tensor:
        return attend_in_groups(self, x, strips(require_grid(grid), self.axis), mask)


class AxialAttention(nn.Module):
    r"""Every token attends its column, then its row: after both it has heard from every token.

    .. math::
        y = \mathrm{strip}_{width}(\mathrm{strip}_{height}(x))

    Args:
        dim: Width of a token.
        num_heads: H; must divide ``dim``.
        similarity: f_sim; None is ScaledDot. Each axis has a copy, as of what follows.
        normalize: f_norm; None is Softmax.
        position: A rotation or bias of ``visattn.core.position``; None for none.
        qkv_bias: Add a bias to queries, keys and values.

    Shape:
        As WindowAttention.

    Map:
        Two, one of the columns and one of the rows; see StripAttention.

    Raises:
        ValueError: As WindowAttention.

    Reference:
        Wang et al. 2020, "Axial-DeepLab", section 3.2, https://arxiv.org/abs/2003.07853 (height,
        then width). Differs
        from: positions act on scores as chosen, the paper's also act on values; no batch norm on
            the scores.

    Example:
        >>> import torch
        >>> AxialAttention(12, 3)(torch.rand(2, 35, 12), grid=(5, 7)).shape
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
        qkv_bias: bool = True,
    ):
        super().__init__()
        self.height = StripAttention(
            dim,
            num_heads,
            axis="height",
            similarity=similarity,
            normalize=normalize,
            position=position,
            qkv_bias=qkv_bias,
        )
        # The second axis has parameters of its own.
        self.width = StripAttention(
            dim,
            num_heads,
            axis="width",
            similarity=deepcopy(similarity),
            normalize=deepcopy(normalize),
            position=deepcopy(position),
            qkv_bias=qkv_bias,
        )

    def forward(self, x: Tensor, *, grid: Pair | None = None, mask: Tensor | None = None) -> Tensor:
        return self.width(self.height(x, grid=grid, mask=mask), grid=grid, mask=mask)


class CrissCrossAttention(SelfAttention):
    r"""Every token attends its row and its column in one sum, itself once.

    .. math::
        y_u = \sum_{j \in \mathrm{row}(u) \cup \mathrm{column}(u)} \alpha_{uj} v_j\, W_o

    Args:
        dim: Width of a token; this and the rest as SelfAttention.

    Shape:
        As WindowAttention.

    Map:
        (B, H, N, N), zero off the cross; rows sum to one where the normalizer says so.

    Raises:
        ValueError: As WindowAttention.

    Reference:
        Huang et al. 2019, "CCNet: Criss-Cross Attention for Semantic Segmentation", eq. 1-2,
        https://arxiv.org/abs/1811.11721. Differs from: one pass (the paper repeats it, with shared
        weights).

    Example:
        >>> import torch
        >>> CrissCrossAttention(12, 3)(torch.rand(2, 35, 12), grid=(5, 7)).shape
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
        qkv_bias: bool = True,
        qk_norm: bool = False,
        dropout: float = 0.0,
    ):
        super().__init__(
            dim,
            num_heads,
            similarity=similarity,
            normalize=normalize,
            position=position,
            qkv_bias=qkv_bias,
            qk_norm=qk_norm,
            dropout=dropout,
        )
        self.attend = CrissCrossAttend(
            self.attend.similarity, self.attend.normalize, dropout=dropout
        )

    def forward(self, x: Tensor, *, grid: Pair | None = None, mask: Tensor | None = None) -> Tensor:
        if mask is not None:
            check_token_mask(mask, x)
        layout = CrissCross(require_grid(grid))
        return attend_folded(self, x, layout, token_mask(mask, self.attend))
