"""The normalizers as row functions for the tiled evaluation: statistic, weights and vector-Jacobian product.

Every function may overwrite the tile it is given first. ``count`` is the number of keys a row may
attend, ``p`` the exponent 1 / (alpha - 1) of entmax. Masked scores are -inf, and the weights of a
row without any key are zero.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from visattn.core.kernels.threshold import threshold


class Row(NamedTuple):
    """One normalizer: s = statistic(e), alpha = weights(e, s), de = vjp(alpha, d alpha, s)."""

    statistic: Callable[[Tensor, Tensor | int, Tensor | float], Tensor]
    weights: Callable[[Tensor, Tensor, Tensor | int, Tensor | float], Tensor]
    vjp: Callable[[Tensor, Tensor, Tensor, Tensor | int, Tensor | float], Tensor]


def _none(e: Tensor, count, p) -> Tensor:
    return e.new_zeros((*e.shape[:-1], 1))


def _lse(e: Tensor, count, p) -> Tensor:
    return e.logsumexp(-1, keepdim=True)


def _lse1(e: Tensor, count, p) -> Tensor:
    lse = _lse(e, count, p)
    return torch.logaddexp(lse, torch.zeros_like(lse))


def _exp(e: Tensor, s: Tensor, count, p) -> Tensor:
    return e.sub_(s.masked_fill(s == -torch.inf, 0)).exp_()


def _softmax_vjp(alpha: Tensor, grad: Tensor, s: Tensor, count, p) -> Tensor:
    return grad.sub_((alpha * grad).sum(-1, keepdim=True)).mul_(alpha)


def _sigmoid(e: Tensor, s: Tensor, count, p) -> Tensor:
    return e.sub_(count.log() if isinstance(count, Tensor) else math.log(count)).sigmoid_()


def _sigmoid_vjp(alpha: Tensor, grad: Tensor, s: Tensor, count, p) -> Tensor:
    return torch.ops.aten.sigmoid_backward(grad, alpha)


def _relu(e: Tensor, s: Tensor, count, p) -> Tensor:
    return e.clamp_(min=0).div_(count)


def _relu_vjp(alpha: Tensor, grad: Tensor, s: Tensor, count, p) -> Tensor:
    return torch.ops.aten.threshold_backward(grad, alpha, 0).div_(count)


def _from_top(e: Tensor) -> Tensor:
    """Move the origin of every row to its largest score, in place: thresholds of huge scores keep their digits."""
    top = e.amax(-1, keepdim=True)
    return e.sub_(top.masked_fill_(top == -torch.inf, 0))


def _threshold(x: Tensor, count, p) -> Tensor:
    if isinstance(count, Tensor):  # a row without any key gets a threshold above all its scores
        x = x.masked_fill((x == -torch.inf).all(-1, keepdim=True), 0.0)
    return threshold(x, p)


def _sparsemax_threshold(e: Tensor, count, p) -> Tensor:
    return _threshold(_from_top(e), count, 1.0)


def _sparsemax(e: Tensor, s: Tensor, count, p) -> Tensor:
    return _from_top(e).sub_(s).clamp_(min=0)


def _support_vjp(alpha: Tensor, grad: Tensor, weight: Tensor) -> Tensor:
    total = weight.sum(-1, keepdim=True)
    mean = (weight * grad).sum(-1, keepdim=True) / total.masked_fill(total == 0, 1)
    return grad.sub_(mean).mul_(weight)


def _sparsemax_vjp(alpha: Tensor, grad: Tensor, s: Tensor, count, p) -> Tensor:
    return _support_vjp(alpha, grad, alpha.sign())


def _entmax15_threshold(e: Tensor, count, p) -> Tensor:
    return _threshold(_from_top(e) / 2, count, 2.0)


def _entmax15(e: Tensor, s: Tensor, count, p) -> Tensor:
    return _from_top(e).div_(2).sub_(s).clamp_(min=0).square_()


def _entmax15_vjp(alpha: Tensor, grad: Tensor, s: Tensor, count, p) -> Tensor:
    return _support_vjp(alpha, grad, alpha.sqrt())


def _entmax_threshold(e: Tensor, count, p) -> Tensor:
    return _threshold(_from_top(e) / p, count, p)


def _entmax(e: Tensor, s: Tensor, count, p) -> Tensor:
    return _from_top(e).div_(p).sub_(s).clamp_(min=0).pow_(p)


def _entmax_vjp(alpha: Tensor, grad: Tensor, s: Tensor, count, p) -> Tensor:
    # alpha ** (2 - a) with a = 1 + 1 / p; zero weights stay outside the support also where a = 2
    return _support_vjp(alpha, grad, torch.where(alpha > 0, alpha ** (1 - 1 / p), 0.0))


def _plain(e: Tensor, s: Tensor, count, p) -> Tensor:
    return e.masked_fill_(e == -torch.inf, 0).div_(count)


def _plain_vjp(alpha: Tensor, grad: Tensor, s: Tensor, count, p) -> Tensor:
    return grad.div_(count)


def _absolute_sum(e: Tensor, count, p) -> Tensor:
    total = e.masked_fill(e == -torch.inf, 0).abs().sum(-1, keepdim=True)
    return total.masked_fill(total == 0, 1)


def _l1(e: Tensor, s: Tensor, count, p) -> Tensor:
    return e.masked_fill_(e == -torch.inf, 0).div_(s)


def _l1_vjp(alpha: Tensor, grad: Tensor, s: Tensor, count, p) -> Tensor:
    return grad.sub_(alpha.sign() * (alpha * grad).sum(-1, keepdim=True)).div_(s)


ROWS = {
    "softmax": Row(_lse, _exp, _softmax_vjp),
    "softmax1": Row(_lse1, _exp, _softmax_vjp),
    "sigmoid": Row(_none, _sigmoid, _sigmoid_vjp),
    "relu": Row(_none, _relu, _relu_vjp),
    "sparsemax": Row(_sparsemax_threshold, _sparsemax, _sparsemax_vjp),
    "entmax15": Row(_entmax15_threshold, _entmax15, _entmax15_vjp),
    "entmax": Row(_entmax_threshold, _entmax, _entmax_vjp),
    "none": Row(_none, _plain, _plain_vjp),
    "l1": Row(_absolute_sum, _l1, _l1_vjp),
}
"""Row functions by the name a normalizer gives as its ``kernel``."""


def entmax_exponent_grad(alpha: Tensor, grad: Tensor, p: Tensor) -> Tensor:
    r"""Return the gradient of sum(alpha * grad) by a, one value per row, at fixed scores.

    With r = alpha^(1/p), alpha_i = r_i^p, r_i = (a - 1) e_i - t and p = 1 / (a - 1), the derivative
    is alpha_i (-p^2 ln r_i) + p g_i (e_i - t'), g = alpha^(2 - a), where t' makes the row's sum
    zero. Since e_i = (r_i + t) p, the part of e_i that is constant over the row cancels against t'
    and r_i p g_i = p alpha_i stays.
    """
    support = alpha > 0
    log_r = torch.where(support, alpha, 1.0).log() / p
    weight = torch.where(support, alpha ** (1 - 1 / p), 0.0)
    direction = p * p * alpha * (1 - log_r)
    total = weight.sum(-1, keepdim=True)
    direction = direction - weight * direction.sum(-1, keepdim=True) / total.masked_fill(
        total == 0, 1
    )
    return (direction * grad).sum(-1, keepdim=True)
