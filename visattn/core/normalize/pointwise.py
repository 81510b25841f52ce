"""Normalizers that weigh every score by itself."""

import torch
from torch import Tensor

from visattn.core.normalize.definition import Normalizer


class Sigmoid(Normalizer):
    r"""A sigmoid of every score, shifted so that a row sums to about one at first.

    .. math::
        \alpha_{ij} = \sigma(e_{ij} + b), \qquad b = -\ln N_k

    Args:
        num_heads: H.

    Shape:
        As :class:`Normalizer`; weights in (0, 1). N_k counts the keys that a query may attend.

    Map:
        The output; rows do not sum to one.

    Raises:
        ValueError: ``num_heads`` is below 1.

    Reference:
        Ramapuram et al. 2024, "Theory, Analysis, and Best Practices for Sigmoid Self-Attention",
        https://arxiv.org/abs/2409.04431. Differs from: nothing.

    Example:
        >>> Sigmoid()(torch.zeros(1, 1, 1, 3))
        tensor([[[[0.2500, 0.2500, 0.2500]]]])
    """

    head_local = True
    kernel = "sigmoid"

    def weights(self, e: Tensor, count: int | Tensor) -> Tensor:
        if not isinstance(count, Tensor):
            count = torch.full((), count, dtype=e.dtype, device=e.device)
        return torch.sigmoid(e - count.to(e.dtype).log())


class ReLU(Normalizer):
    r"""The positive part of every score over the number of keys.

    .. math::
        \alpha_{ij} = \max(e_{ij}, 0) / N_k

    Args:
        num_heads: H.

    Shape:
        As :class:`Normalizer`; weights not negative. N_k counts the keys that a query may attend.

    Map:
        The output; rows do not sum to one.

    Raises:
        ValueError: ``num_heads`` is below 1.

    Reference:
        Wortsman et al. 2023, "Replacing softmax with ReLU in Vision Transformers",
        https://arxiv.org/abs/2309.08586.
        Differs from: nothing (the paper's exponent of the length is one here).

    Example:
        >>> ReLU()(torch.tensor([[[[2.0, -1.0]]]]))
        tensor([[[[1., 0.]]]])
    """

    head_local = True
    kernel = "relu"

    def weights(self, e: Tensor, count: int | Tensor) -> Tensor:
        return torch.relu(e) / count
