"""Criss-cross attention: a position attends its row and its column."""

import torch
from torch import Tensor, nn

from visattn.blocks.parts.check import hidden_width, require_map, require_positive
from visattn.blocks.parts.tokens import map_size, project_tokens, to_map
from visattn.core.formula import Attend
from visattn.core.layout import CrissCross
from visattn.core.normalize.exponential import Softmax
from visattn.core.similarity.product import Dot


class CrissCrossAttend(Attend):
    r"""The formula where a token meets its row and its column, itself once, at a cost of N (H + W).

    .. math::
        m_{ij} = \sum_{l} \alpha_{ij,il}\, v_{il} + \sum_{l \ne i} \alpha_{ij,lj}\, v_{lj}

    Args:
        similarity: f_sim.
        normalize: f_norm, over row and column together; row-local.

    Shape:
        As Attend, with ``layout`` a CrissCross over the grid of the tokens; no bias and no mask.

    Map:
        (B, H, N, N); zero outside row and column.

    Raises:
        ValueError: A bias, a mask or another layout is given.

    Reference:
        Huang et al. 2019, "CCNet", https://arxiv.org/abs/1811.11721. Differs from: any f_sim and
        f_norm.

    Example:
        >>> x = torch.rand(2, 1, 6, 5)
        >>> CrissCrossAttend(Dot(5), Softmax())(x, x, x, layout=CrissCross((2, 3))).shape
        torch.Size([2, 1, 6, 5])
    """

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        bias=None,
        mask=None,
        layout=None,
    ) -> Tensor:
        if bias is not None or mask is not None or not isinstance(layout, CrissCross):
            raise ValueError(f"layout must be a CrissCross, without bias and mask; got {layout}")
        height, width = layout.grid
        q, k, v = (x.unflatten(2, (height, width)) for x in (q, k, v))
        across = self._lines(q, k)
        down = self._lines(q.transpose(2, 3), k.transpose(2, 3)).transpose(2, 3)
        # The row has the token itself, so the column does without.
        itself = torch.eye(height, dtype=torch.bool, device=q.device)[:, None]
        scores = torch.cat([down.masked_fill(itself, -torch.inf), across], -1).flatten(2, 3)
        alpha = self.normalize.weights(scores, height + width - 1).to(v.dtype)
        down, across = alpha.unflatten(2, (height, width)).split([height, width], -1)
        m = across @ v + (down.transpose(2, 3) @ v.transpose(2, 3)).transpose(2, 3)
        return m.flatten(2, 3)

    def _lines(self, q: Tensor, k: Tensor) -> Tensor:
        """Scores within lines: (B, heads, lines, T, D) -> (B, heads, lines, T, T)."""
        lines = q.shape[2]
        q, k = (x.transpose(1, 2).flatten(0, 1) for x in (q, k))
        return self.similarity(q, k).unflatten(0, (-1, lines)).transpose(1, 2)


class CrissCrossAttention2d(nn.Module):
    r"""Add to each position what it attends in its row and column, R times.

    .. math::
        x^{(r + 1)}_u = x^{(r)}_u + \gamma \sum_{j \in \mathrm{cross}(u)}
            \mathrm{softmax}_j(q_u^\top k_j)\, v_j

    Twice is enough for every position to reach every other.

    Args:
        channels: C, the width of the values.
        reduction: r, so queries and keys have ``max(1, C // r)`` channels.
        recurrence: R, with the same weights each time.

    Shape:
        - Input and output: (B, C, H, W).

    Map:
        ``attend``, kind token, once per pass: (B, 1, N, N), zero outside row and column; rows sum
        to one.

    Raises:
        ValueError: A size is below 1.

    Reference:
        Huang et al. 2019, "CCNet: Criss-Cross Attention for Semantic Segmentation",
        https://arxiv.org/abs/1811.11721. Differs from the authors' code in: nothing; their module
        is ``recurrence=1``, and the head around it repeats it.

    Example:
        >>> x = torch.rand(2, 12, 7, 11)
        >>> torch.equal(CrissCrossAttention2d(12)(x), x)
        True
    """

    def __init__(
        self,
        channels: int,
        *,
        reduction: int = 8,
        recurrence: int = 2,
    ):
        super().__init__()
        inner = hidden_width(channels, reduction)
        require_positive(recurrence=recurrence)
        self.channels = channels
        self.recurrence = recurrence
        self.query = nn.Conv2d(channels, inner, 1)
        self.key = nn.Conv2d(channels, inner, 1)
        self.value = nn.Conv2d(channels, channels, 1)
        self.attend = CrissCrossAttend(Dot(inner), Softmax())
        self.gamma = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        require_map(x, self.channels)
        layout = CrissCross(map_size(x))
        for _ in range(self.recurrence):
            q, k, v = project_tokens(x, self.query, self.key, self.value)
            m = to_map(self.attend(q, k, v, layout=layout), x)
            x = torch.addcmul(x, self.gamma.to(x.dtype), m.to(x.dtype))
        return x
