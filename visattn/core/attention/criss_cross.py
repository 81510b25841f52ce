"""The formula on rows and columns: N (H + W) scores in place of N x N."""

import torch
from torch import Tensor

from visattn.core.call import DEFAULT_NORMALIZER, DEFAULT_SIMILARITY
from visattn.core.formula import Attend, Plan
from visattn.core.layout import CrissCross


class CrissCrossAttend(Attend):
    r"""The formula where a token meets its row and its column, itself once.

    .. math::
        m_{ij} = \sum_{l} \alpha_{ij,il}\, v_{il} + \sum_{l \ne i} \alpha_{ij,lj}\, v_{lj}

    Rows and columns are scored apart, at a cost of N (H + W). What that does not serve (a bias, a
    mask that differs by query, a normalizer whose rows depend on each other, a similarity that
    looks at all keys, dropout, shared heads) is evaluated under the N x N mask of the cross.

    Args:
        similarity: f_sim; None is ScaledDot.
        normalize: f_norm, over row and column together; None is Softmax.
        dropout: Share of the weights dropped in training.
        impl: As in :func:`attend`; any but ``"auto"`` takes the N x N mask.

    Shape:
        As Attend, with ``layout`` a CrissCross over the grid of the tokens. ``mask`` says which of
        the keys on the cross may be attended.

    Map:
        (B, H, N, N); zero outside row and column.

    Raises:
        ValueError: ``layout`` is missing.

    Reference:
        Huang et al. 2019, "CCNet", https://arxiv.org/abs/1811.11721. Differs from: any f_sim and
        f_norm.

    Example:
        >>> x = torch.rand(2, 1, 6, 5)
        >>> CrissCrossAttend()(x, x, x, layout=CrissCross((2, 3))).shape
        torch.Size([2, 1, 6, 5])
    """

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        bias: Tensor | None = None,
        mask: Tensor | None = None,
        layout: object | None = None,
    ) -> Tensor:
        cross = _require_cross(layout)
        if self._refuses(q, k, bias, mask) is None:
            return self._evaluate_lines(q, k, v, mask, cross.grid)
        return super().forward(q, k, v, bias, _join(cross, mask, q), layout)

    def plan(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        bias: Tensor | None = None,
        mask: Tensor | None = None,
        layout: object | None = None,
    ) -> Plan:
        cross = _require_cross(layout)
        reason = self._refuses(q, k, bias, mask)
        if reason is None:
            return Plan("criss_cross", "rows and columns are scored apart: N (H + W) scores")
        plan = super().plan(q, k, v, bias, _join(cross, mask, q), layout)
        return Plan(plan.impl, f"{plan.why}; under the N x N mask of the cross, since {reason}")

    def _refuses(
        self, q: Tensor, k: Tensor, bias: Tensor | None, mask: Tensor | None
    ) -> str | None:
        """Return why rows and columns cannot be scored apart; None where they can."""
        similarity = self.similarity or DEFAULT_SIMILARITY
        normalize = self.normalize or DEFAULT_NORMALIZER
        if self.impl != "auto":
            return f"the module was made with impl={self.impl!r}"
        if bias is not None:
            return "a bias has a number for every pair of tokens"
        if mask is not None and (mask.ndim != 4 or mask.shape[2] != 1):
            return "the mask differs by query"
        if not normalize.row_local or (normalize.stochastic and normalize.training):
            return f"{type(normalize).__name__} needs the whole matrix"
        if not similarity.key_local:
            return f"{type(similarity).__name__} looks at all keys at once"
        if self.training and self.dropout:
            return "weights are dropped"
        if q.shape[1] != k.shape[1]:
            return "query heads share keys"
        return None

    def _evaluate_lines(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, grid: tuple[int, int]
    ) -> Tensor:
        normalize = self.normalize or DEFAULT_NORMALIZER
        height, width = grid
        q = q.unflatten(2, grid)  # (B, heads, H, W, D)
        k = k.unflatten(2, grid)
        v = v.unflatten(2, grid)
        across = self._score_lines(q, k)  # (B, heads, H, W, W)
        down = self._score_lines(q.transpose(2, 3), k.transpose(2, 3)).transpose(2, 3)
        # The row has the token itself, so the column does without.
        itself = torch.eye(height, dtype=torch.bool, device=q.device)[:, None]  # (H, 1, H)
        scores = torch.cat([down.masked_fill(itself, -torch.inf), across], -1).flatten(2, 3)
        if mask is None:
            alpha = normalize.weights(scores, height + width - 1)
        else:
            alpha = normalize(scores, _mask_lines(mask, grid, itself))
        alpha = alpha.to(v.dtype).unflatten(2, grid)
        down, across = alpha.split([height, width], -1)
        from_rows = across @ v
        from_columns = (down.transpose(2, 3) @ v.transpose(2, 3)).transpose(2, 3)
        return (from_rows + from_columns).flatten(2, 3)

    def _score_lines(self, q: Tensor, k: Tensor) -> Tensor:
        """Score within lines: (B, heads, lines, T, D) -> (B, heads, lines, T, T)."""
        similarity = self.similarity or DEFAULT_SIMILARITY
        lines = q.shape[2]
        q = q.transpose(1, 2).flatten(0, 1)  # (B * lines, heads, T, D)
        k = k.transpose(1, 2).flatten(0, 1)
        return similarity(q, k).unflatten(0, (-1, lines)).transpose(1, 2)


def _mask_lines(mask: Tensor, grid: tuple[int, int], itself: Tensor) -> Tensor:
    """Read a mask over keys (B, H, 1, N) along the column and the row of each token."""
    height, width = grid
    keys = mask[:, :, 0].unflatten(2, grid)  # (B, heads, H, W)
    column = keys.transpose(2, 3)[:, :, None].expand(-1, -1, height, -1, -1) & ~itself
    row = keys[:, :, :, None].expand(-1, -1, -1, width, -1)
    return torch.cat([column, row], -1).flatten(2, 3)  # (B, heads, N, H + W)


def _join(cross: CrissCross, mask: Tensor | None, q: Tensor) -> Tensor:
    meets = cross.meets(q.device)
    return meets if mask is None else meets & mask


def _require_cross(layout: object | None) -> CrissCross:
    if not isinstance(layout, CrissCross):
        raise ValueError(f"layout must be a CrissCross over the grid of the tokens; got {layout}")
    return layout
