"""Normalizers that scale the scores and nothing more: linear in time with a similarity of inner products."""

from torch import Tensor

from visattn.core.normalize.definition import Normalizer, zero_masked


class L1(Normalizer):
    r"""Scores over the sum of their absolute values.

    .. math::
        \alpha_{ij} = \frac{e_{ij}}{\sum_k |e_{ik}|}

    Linear in time where e is an inner product of features that are never negative.

    Args:
        num_heads: H.

    Shape:
        As :class:`Normalizer`; weights in [-1, 1]; a row of zeros stays zero.

    Map:
        The output; absolute values of a row sum to one.

    Raises:
        ValueError: ``num_heads`` is below 1.

    Reference:
        Katharopoulos et al. 2020, "Transformers are RNNs", eq. 4, https://arxiv.org/abs/2006.16236.
        Differs from: the absolute value, which is nothing new where scores are not negative.

    Example:
        >>> import torch
        >>> L1()(torch.tensor([[[[1.0, -3.0]]]]))
        tensor([[[[ 0.2500, -0.7500]]]])
    """

    head_local = True
    kernel = "l1"
    linear_divisor = "absolute_sum"

    def weights(self, e: Tensor, count: int | Tensor) -> Tensor:
        e = zero_masked(e)
        total = e.abs().sum(-1, keepdim=True)
        return e / total.masked_fill(total == 0, 1)


class Uniform(Normalizer):
    r"""Scores over the number of keys: no normalization but a mean.

    .. math::
        \alpha_{ij} = e_{ij} / N_k

    Linear in time with every similarity that has an inner-product form.

    Args:
        num_heads: H.

    Shape:
        As :class:`Normalizer`; any real numbers. N_k counts the keys that a query may attend.

    Map:
        The output; rows do not sum to one.

    Raises:
        ValueError: ``num_heads`` is below 1.

    Reference:
        Wang, Girshick, Gupta, He 2018, "Non-local Neural Networks", eq. 4 and 5,
        https://arxiv.org/abs/1711.07971.
        Differs from: nothing.

    Example:
        >>> import torch
        >>> Uniform()(torch.tensor([[[[1.0, -3.0]]]]))
        tensor([[[[ 0.5000, -1.5000]]]])
    """

    head_local = True
    kernel = "none"
    linear_divisor = "count"

    def weights(self, e: Tensor, count: int | Tensor) -> Tensor:
        return zero_masked(e) / count
