"""The threshold of alpha-entmax by Newton's method on the p-norm."""

import torch
from torch import Tensor

_STEPS = 20


def newton_step(x: Tensor, t: Tensor, p: float | Tensor) -> Tensor:
    """Return t after one differentiable Newton step on h(t) = ||(x - t)+||_p - 1."""
    support = x > t
    # Outside of the support r is 1, so that no power of it has an infinite gradient.
    r = torch.where(support, x - t, 1.0)
    power_sum = torch.where(support, r**p, 0.0).sum(-1, keepdim=True)
    slope_sum = torch.where(support, r ** (p - 1), 0.0).sum(-1, keepdim=True)
    return t + _step(power_sum, slope_sum, p)


def _step(power_sum: Tensor, slope_sum: Tensor, p: float | Tensor) -> Tensor:
    """Return the Newton step from the row sums of r^p and r^(p - 1)."""
    root = power_sum ** (1 - 1 / p)
    return (power_sum - root) / slope_sum


def _fast_step(x: Tensor, t: Tensor, p: float | Tensor) -> Tensor:
    """Return one Newton step in as few passes as p allows; ``x`` stays unchanged."""
    r = (x - t).clamp_(min=0)
    if isinstance(p, float) and p == 2.0:
        norm = torch.linalg.vector_norm(r, dim=-1, keepdim=True)
        return norm * (norm - 1) / r.sum(-1, keepdim=True)
    if isinstance(p, float) and p == 1.0:
        mass = r.sum(-1, keepdim=True)
        return (mass - 1) / r.sign_().sum(-1, keepdim=True)
    slope = torch.where(r > 0, r ** (p - 1), 0.0)
    power_sum = (slope * r).sum(-1, keepdim=True)
    return _step(power_sum, slope.sum(-1, keepdim=True), p)


@torch.no_grad()
def threshold(x: Tensor, p: float | Tensor) -> Tensor:
    r"""Return the t of every row with :math:`\sum_j (x_j - t)_+^p = 1`.

    h is convex for p >= 1, so that Newton's method rises monotonically from any point on the left:
    no bracket, no bisection. The start is the larger of max x - 1 and, by Jensen's inequality,
    mean x - M^(-1/p).

    Args:
        x: (..., M) scores times (alpha - 1); at least one finite entry a row.
        p: 1 / (alpha - 1), a number or a tensor that broadcasts against the rows.
    """
    jensen_bound = x.mean(-1, keepdim=True) - x.shape[-1] ** (-1 / p)
    t = torch.maximum(x.amax(-1, keepdim=True) - 1, jensen_bound)
    # Asking whether all rows have converged costs a GPU a synchronization, and breaks a graph.
    stop_early = x.device.type == "cpu" and not torch.compiler.is_compiling()
    tolerance = 4 * torch.finfo(x.dtype).eps
    for _ in range(_STEPS):
        step = _fast_step(x, t, p)
        t = t + step
        if stop_early and bool((step <= tolerance * (1 + t.abs())).all()):
            break
    return t
