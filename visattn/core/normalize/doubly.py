"""Normalizers over queries and keys: the weights of a query depend on the other queries."""

import torch
from torch import Tensor

from visattn.core.normalize.definition import Normalizer, SoftmaxForm


def _lse(e: Tensor, axis: int) -> Tensor:
    """Return log sum exp along an axis, zero where every entry is masked."""
    is_empty = (e == -torch.inf).all(axis, keepdim=True)
    lse = e.masked_fill(is_empty, 0.0).logsumexp(axis, keepdim=True)
    return lse.masked_fill(is_empty, 0.0)


class Double(Normalizer):
    r"""Softmax over the queries, then each row over its sum.

    .. math::
        \hat\alpha_{ij} = \frac{e^{e_{ij}}}{\sum_k e^{e_{kj}}}, \qquad
        \alpha_{ij} = \frac{\hat\alpha_{ij}}{\sum_k \hat\alpha_{ik}}

    Args:
        num_heads: H.

    Shape:
        As :class:`Normalizer`; weights in (0, 1).

    Map:
        The output; rows sum to one.

    Raises:
        ValueError: ``num_heads`` is below 1.

    Reference:
        Guo et al. 2021, "Beyond Self-attention: External Attention using Two Linear Layers for
        Visual Tasks", eq. 7 to 9, https://arxiv.org/abs/2105.02358. Differs from: no small number
        is added to the sum, which cannot vanish.

    Example:
        >>> Double()(torch.zeros(1, 1, 3, 2))[0, 0, 0]
        tensor([0.5000, 0.5000])
    """

    row_local = False
    rows_sum_to_one = True
    softmax_form = SoftmaxForm(column_passes=1)

    def weights(self, e: Tensor, count: int | Tensor) -> Tensor:
        e = e - _lse(e, -2)
        return (e - _lse(e, -1)).exp()


class Sinkhorn(Normalizer):
    r"""Columns and rows of the exponentials, normalized in turn, rows last.

    .. math::
        A \leftarrow e^{e}, \qquad T \text{ times: } A_{ij} \leftarrow A_{ij} / \textstyle\sum_k A_{kj}, \quad
        A_{ij} \leftarrow A_{ij} / \sum_k A_{ik}

    Args:
        num_heads: H.
        iterations: T.

    Shape:
        As :class:`Normalizer`; weights in (0, 1).

    Map:
        The output; rows sum to one, and columns to Nq / Nk as T grows.

    Raises:
        ValueError: ``iterations`` or ``num_heads`` is below 1.

    Reference:
        Sander et al. 2022, "Sinkformers: Transformers with Doubly Stochastic Attention",
        https://arxiv.org/abs/2110.11773. Differs from: each pass ends with the rows, so that a map
        sums to one.

    Example:
        >>> Sinkhorn()(torch.zeros(1, 1, 2, 2))[0, 0, 0]
        tensor([0.5000, 0.5000])
    """

    row_local = False
    rows_sum_to_one = True

    def __init__(self, num_heads: int = 1, *, iterations: int = 3):
        super().__init__(num_heads)
        if iterations < 1:
            raise ValueError(f"iterations must be at least 1; got {iterations}")
        self.iterations = iterations

    @property
    def softmax_form(self) -> SoftmaxForm:  # type: ignore[override]  # it depends on iterations
        return SoftmaxForm(column_passes=self.iterations)

    def weights(self, e: Tensor, count: int | Tensor) -> Tensor:
        for _ in range(self.iterations):
            e = e - _lse(e, -2)
            e = e - _lse(e, -1)
        return e.exp()
