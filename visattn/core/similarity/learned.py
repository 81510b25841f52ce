"""Similarities by a small network."""

import torch
from torch import Tensor, nn

from visattn.core.similarity.definition import Similarity, glorot


class Additive(Similarity):
    r"""A small network with one hidden layer.

    .. math::
        e_{ij} = v_h^\top \tanh(W_h q_i + U_h k_j)

    Args:
        head_dim: D, the width of a query.
        num_heads: H.
        hidden_dim: Width of the hidden layer; None is ``head_dim``.
        key_dim: Width of a key; None is ``head_dim``.

    Shape:
        As :class:`Similarity`, with keys (B, H, Nk, ``key_dim``).

    Map:
        None.

    Raises:
        ValueError: a size is below 1.

    Reference:
        Bahdanau, Cho, Bengio 2014, "Neural Machine Translation by Jointly Learning to Align and
        Translate", appendix A.1.2, https://arxiv.org/abs/1409.0473; "concat" of Luong et al. 2015
        is the same with [W U] as one matrix.
        Differs from: the initial values, which are uniform (Glorot) for all three.

    Example:
        >>> Additive(2, hidden_dim=3)(torch.ones(1, 1, 5, 2), torch.ones(1, 1, 7, 2)).shape
        torch.Size([1, 1, 5, 7])
    """

    head_local = True

    def __init__(
        self,
        head_dim: int,
        num_heads: int = 1,
        *,
        hidden_dim: int | None = None,
        key_dim: int | None = None,
    ):
        super().__init__(head_dim, num_heads)
        hidden_dim = head_dim if hidden_dim is None else hidden_dim
        key_dim = head_dim if key_dim is None else key_dim
        for name, value in (("hidden_dim", hidden_dim), ("key_dim", key_dim)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1; got {value}")
        self.tile_width = hidden_dim
        self.key_dim = key_dim
        self.query_weight = nn.Parameter(glorot(num_heads, head_dim, hidden_dim))
        self.key_weight = nn.Parameter(glorot(num_heads, key_dim, hidden_dim))
        self.score_weight = nn.Parameter(glorot(num_heads, hidden_dim, 1))

    def forward(self, q: Tensor, k: Tensor) -> Tensor:
        q = q @ self.query_weight
        k = k @ self.key_weight
        # (B, H, Nq, 1, hidden) + (B, H, 1, Nk, hidden)
        hidden = torch.tanh(q[..., :, None, :] + k[..., None, :, :])
        # (B, H, Nq, Nk, 1) -> (B, H, Nq, Nk)
        return (hidden @ self.score_weight[:, None])[..., 0]


class Concat(Similarity):
    r"""The rectified sum of a number per query and a number per key.

    .. math::
        e_{ij} = \mathrm{ReLU}(w_h^\top q_i + u_h^\top k_j)

    Args:
        head_dim: D.
        num_heads: H.

    Shape:
        As :class:`Similarity`; the scores are not negative.

    Map:
        None.

    Raises:
        ValueError: ``head_dim`` or ``num_heads`` is below 1.

    Reference:
        Wang, Girshick, Gupta, He 2018, "Non-local Neural Networks", eq. 5, "concatenation",
        https://arxiv.org/abs/1711.07971. Differs from: nothing (the paper pairs it with the
        normalizer ``none``).

    Example:
        >>> Concat(2)(torch.ones(1, 1, 5, 2), torch.ones(1, 1, 7, 2)).shape
        torch.Size([1, 1, 5, 7])
    """

    head_local = True

    def __init__(self, head_dim: int, num_heads: int = 1):
        super().__init__(head_dim, num_heads)
        self.query_weight = nn.Parameter(glorot(num_heads, head_dim, 1))
        self.key_weight = nn.Parameter(glorot(num_heads, head_dim, 1))

    def forward(self, q: Tensor, k: Tensor) -> Tensor:
        query_scores = q @ self.query_weight  # (B, H, Nq, 1)
        key_scores = k @ self.key_weight  # (B, H, Nk, 1)
        return torch.relu(query_scores + key_scores.transpose(-2, -1))
