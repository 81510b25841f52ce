"""Normalizers with weights that are exactly zero: the alpha-entmax family."""

import math

import torch
from torch import Tensor, nn

from visattn.core.kernels.threshold import newton_step, threshold
from visattn.core.normalize.definition import Normalizer


def entmax(e: Tensor, p: float | Tensor) -> Tensor:
    """Return [e / p - t]+ ** p, rows summing to one, differentiable in e and p to any order.

    The threshold t is found without gradient; two Newton steps from there leave its value and give
    its derivatives.
    """
    masked = e == -torch.inf
    # Weights do not change with the origin; the largest score as origin keeps digits of huge ones.
    largest = e.detach().amax(-1, keepdim=True)  # (B, H, Nq, 1)
    e = (e - largest).masked_fill(masked, 0.0)
    x = (e / p).masked_fill(masked, -torch.inf)
    fixed_p = p.detach() if isinstance(p, Tensor) else p
    t = threshold(x.detach(), fixed_p)
    t = newton_step(x, t, p)
    t = newton_step(x, t, p)
    support = x > t
    # The power is taken of 1 outside the support: its gradient there would be NaN.
    excess = torch.where(support, x - t, 1.0)
    return torch.where(support, excess**p, 0.0)


class Sparsemax(Normalizer):
    r"""The nearest point of the simplex.

    .. math::
        \alpha_{ij} = [e_{ij} - t_i]_+, \qquad \textstyle\sum_j \alpha_{ij} = 1

    Args:
        num_heads: H.

    Shape:
        As :class:`Normalizer`; weights in [0, 1], most of them zero where scores differ.

    Map:
        The output; rows sum to one.

    Raises:
        ValueError: ``num_heads`` is below 1.

    Reference:
        Martins, Astudillo 2016, "From Softmax to Sparsemax", eq. 2,
        https://arxiv.org/abs/1602.02068. Differs from: the threshold is found by Newton's method,
        not by sorting; the result is the same.

    Example:
        >>> Sparsemax()(torch.tensor([[[[1.0, 0.5, -1.0]]]]))
        tensor([[[[0.7500, 0.2500, 0.0000]]]])
    """

    head_local = True
    shift_invariant = True
    rows_sum_to_one = True
    kernel = "sparsemax"

    def weights(self, e: Tensor, count: int | Tensor) -> Tensor:
        return entmax(e, 1.0)


class Entmax15(Normalizer):
    r"""Half way between softmax and sparsemax.

    .. math::
        \alpha_{ij} = [e_{ij} / 2 - t_i]_+^2, \qquad \textstyle\sum_j \alpha_{ij} = 1

    Args:
        num_heads: H.

    Shape:
        As :class:`Normalizer`; weights in [0, 1].

    Map:
        The output; rows sum to one.

    Raises:
        ValueError: ``num_heads`` is below 1.

    Reference:
        Peters, Niculae, Martins 2019, "Sparse Sequence-to-Sequence Models",
        https://arxiv.org/abs/1905.05702. Differs from: the threshold is found by Newton's method,
        not by sorting.

    Example:
        >>> Entmax15()(torch.tensor([[[[0.0, 0.0, -9.0]]]]))
        tensor([[[[0.5000, 0.5000, 0.0000]]]])
    """

    head_local = True
    shift_invariant = True
    rows_sum_to_one = True
    kernel = "entmax15"

    def weights(self, e: Tensor, count: int | Tensor) -> Tensor:
        return entmax(e, 2.0)


class Entmax(Normalizer):
    r"""The whole family between softmax and sparsemax, with an exponent per head, learned or fixed.

    .. math::
        \alpha_{ij} = [(a_h - 1) e_{ij} - t_i]_+^{1 / (a_h - 1)}, \qquad \textstyle\sum_j \alpha_{ij} = 1

    Args:
        num_heads: H.
        alpha: a at the start, in (1, 2]; below 2 where it is learned.
        learn: Learn a_h = 1 + sigmoid(s_h); otherwise a stays as given.

    Shape:
        As :class:`Normalizer`; weights in [0, 1].

    Map:
        The output; rows sum to one.

    Raises:
        ValueError: ``alpha`` lies outside its range, or ``num_heads`` is below 1.

    Reference:
        Peters, Niculae, Martins 2019, https://arxiv.org/abs/1905.05702; a learned per head by
        Correia, Niculae, Martins 2019, "Adaptively Sparse Transformers",
        https://arxiv.org/abs/1909.00015. Differs from: the threshold is found by Newton's method,
        not by bisection.

    Example:
        >>> Entmax(alpha=1.25)(torch.zeros(1, 1, 1, 2)).detach()
        tensor([[[[0.5000, 0.5000]]]])
    """

    head_local = True
    shift_invariant = True
    rows_sum_to_one = True
    kernel = "entmax"
    logit: nn.Parameter
    fixed: Tensor

    def __init__(self, num_heads: int = 1, *, alpha: float = 1.5, learn: bool = True):
        super().__init__(num_heads)
        if not 1 < alpha <= 2 or (learn and alpha == 2):
            limits = "(1, 2) to be learned" if learn else "(1, 2]"
            raise ValueError(
                f"alpha must lie in {limits}; got {alpha} (softmax is the limit 1, sparsemax is 2)"
            )
        if learn:
            logit = math.log((alpha - 1) / (2 - alpha))
            self.logit = nn.Parameter(torch.full((num_heads,), logit))
        else:
            self.register_buffer("fixed", torch.full((num_heads,), 1 / (alpha - 1)))

    def exponent(self) -> Tensor:
        if hasattr(self, "logit"):
            return 1 / torch.sigmoid(self.logit)
        return self.fixed

    def weights(self, e: Tensor, count: int | Tensor) -> Tensor:
        return entmax(e, self.exponent().to(e.dtype).view(-1, 1, 1))
