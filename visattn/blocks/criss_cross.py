"""Criss-cross attention: a position attends its row and its column."""

import torch
from torch import Tensor, nn

from visattn.blocks.parts.check import hidden_width, require_map, require_positive
from visattn.blocks.parts.tokens import map_size, project_tokens, to_map
from visattn.core.attention.criss_cross import CrissCrossAttend
from visattn.core.layout import CrissCross
from visattn.core.normalize.exponential import Softmax
from visattn.core.similarity.product import Dot


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
