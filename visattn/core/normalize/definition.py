"""f_norm: what turns scores into weights."""

from typing import NamedTuple

import torch
from torch import Tensor, nn


class SoftmaxForm(NamedTuple):
    """How weights can be had from a softmax over the keys.

    Args:
        extra_keys: So many more keys of score and value zero.
        column_passes: So many normalizations over the queries before it.
    """

    extra_keys: int = 0
    column_passes: int = 0

    @property
    def is_plain(self) -> bool:
        return self.extra_keys == 0 and self.column_passes == 0


class Normalizer(nn.Module):
    r"""Weights of every key for every query.

    .. math::
        \alpha_{ij} = f_{norm}(e)_{ij}

    A normalizer of one's own needs ``weights(e, count)``; everything else follows from what it
    declares. A class with new weights does not inherit what described the old ones: ``kernel``,
    ``softmax_form``, ``linear_divisor`` and ``head_local``.

    Args:
        num_heads: H, for parameters of which each head has its own.

    Attributes:
        row_local: Whether the weights of a query depend on no other query.
        shift_invariant: Whether adding a constant to a row changes nothing.
        rows_sum_to_one: Whether the weights of a query sum to one.
        differentiable: Whether the gradient is that of the definition (False: straight-through, or
            steps).
        stochastic: Whether training draws random numbers.
        head_local: Whether heads can be weighed one at a time: no head sees another, and the first
            axis of every parameter and buffer counts the heads.
        kernel: Name of its row functions in ``kernels/rows.py``, or None.
        softmax_form: How the weights can be had from a softmax over the keys, or None.
        linear_divisor: What weights linear in the scores are divided by: ``"count"`` (of keys),
            ``"absolute_sum"`` (of the row), or None where they are not linear.

    Shape:
        - e: (B, H, Nq, Nk), any real numbers; -inf only through ``mask``.
        - mask: bool, broadcastable to e, True where a key may be attended.
        - Output: as e; zero where masked, also in a row that is masked throughout.

    Map:
        The output.

    Raises:
        ValueError: ``num_heads`` is below 1.

    Reference:
        Chaudhari et al. 2021, "An Attentive Survey of Attention Models",
        https://arxiv.org/abs/1904.02874. Differs from: nothing.
    """

    row_local = True
    shift_invariant = False
    rows_sum_to_one = False
    differentiable = True
    stochastic = False
    head_local = False
    kernel: str | None = None
    softmax_form: SoftmaxForm | None = None
    linear_divisor: str | None = None

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        declared = vars(cls)
        if "weights" not in declared and "forward" not in declared:
            return
        for name in ("kernel", "softmax_form", "linear_divisor", "head_local"):
            if name not in declared:
                setattr(cls, name, getattr(Normalizer, name))

    def __init__(self, num_heads: int = 1):
        super().__init__()
        if num_heads < 1:
            raise ValueError(f"num_heads must be at least 1; got {num_heads}")
        self.num_heads = num_heads

    def forward(self, e: Tensor, mask: Tensor | None = None) -> Tensor:
        scores = e.float() if e.dtype in (torch.float16, torch.bfloat16) else e
        if mask is None:
            return self.weights(scores, e.shape[-1]).to(e.dtype)
        mask = mask.expand(*mask.shape[:-1], e.shape[-1])
        scores = scores.masked_fill(~mask, -torch.inf)
        count = mask.sum(-1, keepdim=True).clamp(min=1)
        if self.row_local:
            scores = scores.masked_fill(~mask.any(-1, keepdim=True), 0.0)
        return self.weights(scores, count).masked_fill(~mask, 0.0).to(e.dtype)

    def weights(self, e: Tensor, count: int | Tensor) -> Tensor:
        """Return the weights of scores that are -inf where masked; ``count`` keys of a row are not."""
        raise TypeError(f"{type(self).__name__} must define weights(e, count)")

    def exponent(self) -> Tensor | None:
        """Return 1 / (alpha - 1) per head where the row functions need it."""
        return None


def zero_masked(e: Tensor) -> Tensor:
    """Return scores with zeros for the masked ones."""
    return e.masked_fill(e == -torch.inf, 0.0)
