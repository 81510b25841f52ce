"""Similarities by features that are never negative, for attention in linear time."""

import torch.nn.functional as F
from torch import Tensor

from visattn.core.similarity.definition import InnerProduct


class Linear(InnerProduct):
    r"""The inner product of positive features, for attention in linear time.

    .. math::
        e_{ij} = \phi(q_i) \cdot \phi(k_j), \qquad \phi(x) = \mathrm{elu}(x) + 1

    Args:
        head_dim: D.
        num_heads: H.

    Shape:
        As :class:`Similarity`; the scores are positive.

    Map:
        None.

    Raises:
        ValueError: ``head_dim`` or ``num_heads`` is below 1.

    Reference:
        Katharopoulos et al. 2020, "Transformers are RNNs", eq. 7, https://arxiv.org/abs/2006.16236;
        the paper's
        attention is this with the normalizer ``l1``. Differs from: nothing.

    Example:
        >>> Linear(2)(torch.zeros(1, 1, 1, 2), torch.zeros(1, 1, 1, 2))
        tensor([[[[2.]]]])
    """

    head_local = True
    nonnegative = True

    def dot_form(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        return F.elu(q) + 1, F.elu(k) + 1, None


class Efficient(InnerProduct):
    r"""The inner product of a query normalized over its channels and keys normalized over the tokens.

    .. math::
        e_{ij} = \mathrm{softmax}_d(q_i) \cdot \mathrm{softmax}_n(k)_j

    Rows of e sum to one already, so that ``l1`` leaves them as they are.

    Args:
        head_dim: D.
        num_heads: H.

    Shape:
        As :class:`Similarity`; the scores lie in (0, 1).

    Map:
        None.

    Raises:
        ValueError: ``head_dim`` or ``num_heads`` is below 1.

    Reference:
        Shen et al. 2021, "Efficient Attention: Attention with Linear Complexities",
        https://arxiv.org/abs/1812.01243; the paper's attention is this with the normalizer ``l1``.
        Differs from: nothing.

    Example:
        >>> Efficient(3)(torch.rand(1, 1, 1, 3), torch.rand(1, 1, 5, 3)).sum().round(decimals=4)
        tensor(1.)
    """

    head_local = True
    key_local = False
    nonnegative = True

    def dot_form(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        return q.softmax(-1), k.softmax(-2), None
