"""Normalizers by the exponential of the scores."""

import torch
from torch import Tensor

from visattn.core.normalize.definition import Normalizer, SoftmaxForm


class Softmax(Normalizer):
    r"""Exponentials over their sum.

    .. math::
        \alpha_{ij} = \frac{e^{e_{ij}}}{\sum_k e^{e_{ik}}}

    Args:
        num_heads: H.

    Shape:
        As :class:`Normalizer`; weights in (0, 1).

    Map:
        The output; rows sum to one.

    Raises:
        ValueError: ``num_heads`` is below 1.

    Reference:
        Vaswani et al. 2017, eq. 1, https://arxiv.org/abs/1706.03762. Differs from: nothing.

    Example:
        >>> Softmax()(torch.zeros(1, 1, 1, 4))
        tensor([[[[0.2500, 0.2500, 0.2500, 0.2500]]]])
    """

    head_local = True
    shift_invariant = True
    rows_sum_to_one = True
    kernel = "softmax"
    softmax_form = SoftmaxForm()

    def weights(self, e: Tensor, count: int | Tensor) -> Tensor:
        return e.softmax(-1)


class Softmax1(Normalizer):
    r"""Softmax with one more key of score zero and value zero, so that a query may attend to nothing.

    .. math::
        \alpha_{ij} = \frac{e^{e_{ij}}}{1 + \sum_k e^{e_{ik}}}

    Args:
        num_heads: H.

    Shape:
        As :class:`Normalizer`; weights in (0, 1).

    Map:
        The output; rows sum to less than one.

    Raises:
        ValueError: ``num_heads`` is below 1.

    Reference:
        Miller 2023, "Attention Is Off By One",
        https://www.evanmiller.org/attention-is-off-by-one.html. Differs from: nothing.

    Example:
        >>> Softmax1()(torch.zeros(1, 1, 1, 3))
        tensor([[[[0.2500, 0.2500, 0.2500]]]])
    """

    head_local = True
    kernel = "softmax1"
    softmax_form = SoftmaxForm(extra_keys=1)

    def weights(self, e: Tensor, count: int | Tensor) -> Tensor:
        lse = e.logsumexp(-1, keepdim=True)
        return (e - torch.logaddexp(lse, torch.zeros_like(lse))).exp()


class TopK(Normalizer):
    r"""Softmax over the k largest scores of a row.

    .. math::
        \alpha_{ij} = \frac{[j \in T_i]\, e^{e_{ij}}}{\sum_{k \in T_i} e^{e_{ik}}},
        \qquad T_i = \text{the } k \text{ largest of } e_i

    Args:
        num_heads: H.
        k: How many keys a query attends; all of them where there are fewer.

    Shape:
        As :class:`Normalizer`; at most k weights of a row are not zero.

    Map:
        The output; rows sum to one.

    Raises:
        ValueError: ``k`` or ``num_heads`` is below 1.

    Reference:
        Wang et al. 2021, "KVT: k-NN Attention for Boosting Vision Transformers",
        https://arxiv.org/abs/2106.00515.
        Differs from: nothing; among equal scores the choice is that of ``torch.topk``.

    Example:
        >>> TopK(k=2)(torch.tensor([[[[1.0, 5.0, 5.0]]]]))
        tensor([[[[0.0000, 0.5000, 0.5000]]]])
    """

    head_local = True
    shift_invariant = True
    rows_sum_to_one = True
    differentiable = False

    def __init__(self, num_heads: int = 1, *, k: int = 16):
        super().__init__(num_heads)
        if k < 1:
            raise ValueError(f"k must be at least 1; got {k}")
        self.k = k

    def weights(self, e: Tensor, count: int | Tensor) -> Tensor:
        values, indices = e.topk(min(self.k, e.shape[-1]), -1)
        return torch.zeros_like(e).scatter(-1, indices, values.softmax(-1))


class Hard(Normalizer):
    r"""All weight on the largest score; the gradient is that of the softmax.

    .. math::
        \alpha_{ij} = [j = \arg\max_k e_{ik}]

    Args:
        num_heads: H.

    Shape:
        As :class:`Normalizer`; weights are 0 or 1.

    Map:
        The output; rows sum to one.

    Raises:
        ValueError: ``num_heads`` is below 1.

    Reference:
        Bengio, Leonard, Courville 2013, "Estimating or Propagating Gradients Through Stochastic
        Neurons" (the straight-through estimator), https://arxiv.org/abs/1308.3432. Differs from:
        the choice is deterministic, and the gradient is the softmax's.

    Example:
        >>> Hard()(torch.tensor([[[[1.0, 3.0, 2.0]]]]))
        tensor([[[[0., 1., 0.]]]])
    """

    head_local = True
    shift_invariant = True
    rows_sum_to_one = True
    differentiable = False

    def weights(self, e: Tensor, count: int | Tensor) -> Tensor:
        soft = e.softmax(-1)
        hard = torch.zeros_like(e).scatter(-1, e.argmax(-1, keepdim=True), 1.0)
        return hard + (soft - soft.detach())


class Gumbel(Normalizer):
    r"""Softmax of scores with Gumbel noise while training, without noise in evaluation.

    .. math::
        \alpha_i = \mathrm{softmax}\bigl((e_i + g_i) / \tau\bigr), \qquad g_{ij} \sim \mathrm{Gumbel}(0, 1)

    Args:
        num_heads: H.
        tau: Temperature; the smaller, the nearer to one sampled key.
        generator: Source of the noise; None is torch's own.

    Shape:
        As :class:`Normalizer`; weights in (0, 1).

    Map:
        The output; rows sum to one.

    Raises:
        ValueError: ``tau`` is not positive, or ``num_heads`` is below 1.

    Reference:
        Jang, Gu, Poole 2017, "Categorical Reparameterization with Gumbel-Softmax", eq. 2,
        https://arxiv.org/abs/1611.01144. Differs from: nothing.

    Example:
        >>> Gumbel().eval()(torch.zeros(1, 1, 1, 2))
        tensor([[[[0.5000, 0.5000]]]])
    """

    head_local = True
    shift_invariant = True
    rows_sum_to_one = True
    stochastic = True

    def __init__(
        self, num_heads: int = 1, *, tau: float = 1.0, generator: torch.Generator | None = None
    ):
        super().__init__(num_heads)
        if tau <= 0:
            raise ValueError(f"tau must be positive; got {tau}")
        self.tau = tau
        self.generator = generator

    def weights(self, e: Tensor, count: int | Tensor) -> Tensor:
        if self.training:
            noise = torch.empty_like(e).exponential_(generator=self.generator)
            e = e - noise.log()
        return (e / self.tau).softmax(-1)
