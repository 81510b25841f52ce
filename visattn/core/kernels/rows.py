"""The normalizers as row functions for the tiled evaluation.

A row function has a statistic of the row, the weights, and their vector-Jacobian product. Every
function may overwrite the tile that is its first argument. Masked scores are -inf, and the weights
of a row without any key are zero. The arguments of all of them:

- ``e``: scores (B, H, rows, Nk).
- ``s``: the row's statistic (B, H, rows, 1).
- ``count``: the number of keys a row may attend, one number or one per row.
- ``p``: the exponent 1 / (alpha - 1) of entmax; the other normalizers do not read it.
- ``alpha``, ``grad``: weights and the gradient of the loss by them, shaped as ``e``.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from visattn.core.kernels.threshold import threshold

Count = Tensor | int
Exponent = Tensor | float


class RowStatistics(NamedTuple):
    """The row functions of one normalizer.

    s = statistic(e), alpha = weights(e, s), de = vjp(alpha, d alpha, s).
    """

    statistic: Callable[[Tensor, Count, Exponent], Tensor]
    weights: Callable[[Tensor, Tensor, Count, Exponent], Tensor]
    vjp: Callable[[Tensor, Tensor, Tensor, Count, Exponent], Tensor]


# Softmax and softmax1


def _log_sum_exp(e: Tensor, count: Count, p: Exponent) -> Tensor:
    return e.logsumexp(-1, keepdim=True)


def _log_one_plus_sum_exp(e: Tensor, count: Count, p: Exponent) -> Tensor:
    lse = e.logsumexp(-1, keepdim=True)
    return torch.logaddexp(lse, torch.zeros_like(lse))


def _softmax(e: Tensor, s: Tensor, count: Count, p: Exponent) -> Tensor:
    # -inf - 0 stays -inf, so that a row without any key gets zeros
    origin = s.masked_fill(s == -torch.inf, 0)
    return e.sub_(origin).exp_()


def _softmax_vjp(alpha: Tensor, grad: Tensor, s: Tensor, count: Count, p: Exponent) -> Tensor:
    mean = (alpha * grad).sum(-1, keepdim=True)
    return grad.sub_(mean).mul_(alpha)


# Pointwise: a score's weight depends on the other scores only through their number


def _no_statistic(e: Tensor, count: Count, p: Exponent) -> Tensor:
    return e.new_zeros((*e.shape[:-1], 1))


def _sigmoid(e: Tensor, s: Tensor, count: Count, p: Exponent) -> Tensor:
    if isinstance(count, Tensor):
        return e.sub_(count.log()).sigmoid_()
    return e.sub_(math.log(count)).sigmoid_()


def _sigmoid_vjp(alpha: Tensor, grad: Tensor, s: Tensor, count: Count, p: Exponent) -> Tensor:
    return torch.ops.aten.sigmoid_backward(grad, alpha)


def _relu(e: Tensor, s: Tensor, count: Count, p: Exponent) -> Tensor:
    return e.clamp_(min=0).div_(count)


def _relu_vjp(alpha: Tensor, grad: Tensor, s: Tensor, count: Count, p: Exponent) -> Tensor:
    return torch.ops.aten.threshold_backward(grad, alpha, 0).div_(count)


# The entmax family: alpha = (x - s)+ ^ p with x = e / p, measured from the row's largest score


def _subtract_maximum(e: Tensor) -> Tensor:
    """Move the origin of every row to its largest score, in place.

    Thresholds of huge scores keep their digits.
    """
    top = e.amax(-1, keepdim=True)
    return e.sub_(top.masked_fill_(top == -torch.inf, 0))


def _row_threshold(x: Tensor, count: Count, p: Exponent) -> Tensor:
    """Return the threshold; a row without any key gets one above all its scores."""
    if isinstance(count, Tensor):
        is_empty = (x == -torch.inf).all(-1, keepdim=True)
        x = x.masked_fill(is_empty, 0.0)
    return threshold(x, p)


def _support_vjp(grad: Tensor, slope: Tensor) -> Tensor:
    """Return the score gradient, where ``slope`` is d alpha / d e at a fixed threshold."""
    slope_sum = slope.sum(-1, keepdim=True)
    weighted_sum = (slope * grad).sum(-1, keepdim=True)
    mean = weighted_sum / slope_sum.masked_fill(slope_sum == 0, 1)
    return grad.sub_(mean).mul_(slope)


def _sparsemax_threshold(e: Tensor, count: Count, p: Exponent) -> Tensor:
    return _row_threshold(_subtract_maximum(e), count, 1.0)


def _sparsemax(e: Tensor, s: Tensor, count: Count, p: Exponent) -> Tensor:
    return _subtract_maximum(e).sub_(s).clamp_(min=0)


def _sparsemax_vjp(alpha: Tensor, grad: Tensor, s: Tensor, count: Count, p: Exponent) -> Tensor:
    return _support_vjp(grad, alpha.sign())


def _entmax15_threshold(e: Tensor, count: Count, p: Exponent) -> Tensor:
    return _row_threshold(_subtract_maximum(e) / 2, count, 2.0)


def _entmax15(e: Tensor, s: Tensor, count: Count, p: Exponent) -> Tensor:
    return _subtract_maximum(e).div_(2).sub_(s).clamp_(min=0).square_()


def _entmax15_vjp(alpha: Tensor, grad: Tensor, s: Tensor, count: Count, p: Exponent) -> Tensor:
    return _support_vjp(grad, alpha.sqrt())


def _entmax_threshold(e: Tensor, count: Count, p: Exponent) -> Tensor:
    return _row_threshold(_subtract_maximum(e) / p, count, p)


def _entmax(e: Tensor, s: Tensor, count: Count, p: Exponent) -> Tensor:
    return _subtract_maximum(e).div_(p).sub_(s).clamp_(min=0).pow_(p)


def _entmax_vjp(alpha: Tensor, grad: Tensor, s: Tensor, count: Count, p: Exponent) -> Tensor:
    return _support_vjp(grad, _entmax_slope(alpha, p))


def _entmax_slope(alpha: Tensor, p: Exponent) -> Tensor:
    """Return alpha^(2 - a) with a = 1 + 1 / p.

    Zero weights stay outside of the support also where a = 2.
    """
    return torch.where(alpha > 0, alpha ** (1 - 1 / p), 0.0)


# Linear in the scores


def _none(e: Tensor, s: Tensor, count: Count, p: Exponent) -> Tensor:
    return e.masked_fill_(e == -torch.inf, 0).div_(count)


def _none_vjp(alpha: Tensor, grad: Tensor, s: Tensor, count: Count, p: Exponent) -> Tensor:
    return grad.div_(count)


def _absolute_sum(e: Tensor, count: Count, p: Exponent) -> Tensor:
    total = e.masked_fill(e == -torch.inf, 0).abs().sum(-1, keepdim=True)
    return total.masked_fill(total == 0, 1)


def _l1(e: Tensor, s: Tensor, count: Count, p: Exponent) -> Tensor:
    return e.masked_fill_(e == -torch.inf, 0).div_(s)


def _l1_vjp(alpha: Tensor, grad: Tensor, s: Tensor, count: Count, p: Exponent) -> Tensor:
    # d sum|e| / d e = sign(e) = sign(alpha)
    mean = (alpha * grad).sum(-1, keepdim=True)
    return grad.sub_(alpha.sign() * mean).div_(s)


ROW_STATISTICS = {
    "softmax": RowStatistics(_log_sum_exp, _softmax, _softmax_vjp),
    "softmax1": RowStatistics(_log_one_plus_sum_exp, _softmax, _softmax_vjp),
    "sigmoid": RowStatistics(_no_statistic, _sigmoid, _sigmoid_vjp),
    "relu": RowStatistics(_no_statistic, _relu, _relu_vjp),
    "sparsemax": RowStatistics(_sparsemax_threshold, _sparsemax, _sparsemax_vjp),
    "entmax15": RowStatistics(_entmax15_threshold, _entmax15, _entmax15_vjp),
    "entmax": RowStatistics(_entmax_threshold, _entmax, _entmax_vjp),
    "none": RowStatistics(_no_statistic, _none, _none_vjp),
    "l1": RowStatistics(_absolute_sum, _l1, _l1_vjp),
}
"""Row functions by a normalizer's ``kernel``."""


def entmax_exponent_grad(alpha: Tensor, grad: Tensor, p: Exponent) -> Tensor:
    r"""Return the gradient of sum(alpha * grad) by a, one value per row, at fixed scores.

    With r = alpha^(1/p), alpha_i = r_i^p, r_i = (a - 1) e_i - t and p = 1 / (a - 1), the derivative
    is alpha_i (-p^2 ln r_i) + p g_i (e_i - t'), g = alpha^(2 - a), where t' makes the row's sum
    zero. Since e_i = (r_i + t) p, the part of e_i that is constant over the row cancels against t'
    and r_i p g_i = p alpha_i stays.
    """
    support = alpha > 0
    log_r = torch.where(support, alpha, 1.0).log() / p
    slope = _entmax_slope(alpha, p)
    direction = p * p * alpha * (1 - log_r)
    direction_sum = direction.sum(-1, keepdim=True)
    slope_sum = slope.sum(-1, keepdim=True)
    slope_sum = slope_sum.masked_fill(slope_sum == 0, 1)
    direction = direction - slope * direction_sum / slope_sum
    return (direction * grad).sum(-1, keepdim=True)
