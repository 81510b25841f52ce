"""f_sim: how alike a query and a key are. ``forward`` is the definition; ``dot_form`` its exact inner-product form."""

import math
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn


def _owner(cls: type, name: str) -> type:
    """Return the class that a method comes from."""
    return next(base for base in cls.__mro__ if name in vars(base))


class Similarity(nn.Module):
    r"""Scores of every query against every key.

    .. math::
        e_{ij} = f_{sim}(q_i, k_j)

    A similarity of one's own needs ``forward(q, k)``; with ``dot_form(q, k)`` it becomes fast. A
    new ``forward`` drops an inherited form.

    Args:
        head_dim: D, the width of a query.
        num_heads: H, for parameters of which each head has its own.

    Attributes:
        key_local: Whether the score of a key depends on no other key.
        nonnegative: Whether the features of ``dot_form`` are never negative, so that an l1 row sum
            takes linear time.
        head_local: Whether heads can be scored one at a time: no head sees another, and the first
            axis of every parameter and buffer counts the heads.
        tile_width: Numbers that one score needs at the same time in ``forward``.
        key_dim: Width of a key where it may differ from that of a query, else None.
        has_dot_form: Whether there is a ``dot_form``, of this very ``forward``; found out from the
            class.

    Shape:
        - q: (B, H, Nq, D); k: (B, H, Nk, D).
        - Output: (B, H, Nq, Nk), any real numbers.

    Map:
        None: scores become a map by a normalizer.

    Raises:
        ValueError: ``head_dim`` or ``num_heads`` is below 1.

    Reference:
        Chaudhari et al. 2021, "An Attentive Survey of Attention Models",
        https://arxiv.org/abs/1904.02874. Differs
        from: nothing.
    """

    key_local = True
    nonnegative = False
    head_local = False
    tile_width = 1
    key_dim: int | None = None
    has_dot_form = False

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        form = _owner(cls, "dot_form")
        definition = _owner(cls, "forward")
        cls.has_dot_form = form is not Similarity and issubclass(form, definition)
        declared = vars(cls)
        if "forward" not in declared and "dot_form" not in declared:
            return
        for name in ("plain_scale", "nonnegative", "head_local"):
            if name not in declared:
                setattr(cls, name, vars(Similarity)[name])

    def __init__(self, head_dim: int, num_heads: int = 1):
        super().__init__()
        for name, value in (("head_dim", head_dim), ("num_heads", num_heads)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1; got {value}")
        self.head_dim = head_dim
        self.num_heads = num_heads

    def dot_form(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor, Tensor | None] | None:
        """Return (q', k', bias) with e = q' k'^T + bias, exactly; None where there is no such form."""
        return None

    def plain_scale(self, width: int) -> float | None:
        """Return s where e = s q k^T for queries of this width, untouched; else None."""
        return None

    def extra_repr(self) -> str:
        return f"{self.head_dim}, {self.num_heads}"


class InnerProduct(Similarity):
    """A similarity whose definition is its inner-product form; the product of halves is formed in float32."""

    def forward(self, q: Tensor, k: Tensor) -> Tensor:
        form = self.dot_form(q, k)
        assert form is not None, "an inner product has a form"
        q, k, _ = form
        context: AbstractContextManager = nullcontext()
        if torch.amp.is_autocast_available(q.device.type):
            context = torch.autocast(q.device.type, enabled=False)
        with context:
            return widen(q) @ widen(k).transpose(-2, -1)


def widen(x: Tensor) -> Tensor:
    """Return halves as float32, anything else as it is."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def glorot(*shape: int) -> Tensor:
    """Return uniform values by Glorot's rule for the last two axes."""
    bound = math.sqrt(6 / (shape[-2] + shape[-1]))
    return torch.empty(shape).uniform_(-bound, bound)
