"""Similarities by inner product, as it is or scaled."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visattn.core.similarity.definition import InnerProduct, widen


class Dot(InnerProduct):
    r"""The inner product.

    .. math::
        e_{ij} = q_i \cdot k_j

    Args:
        head_dim: D.
        num_heads: H.

    Shape:
        As :class:`Similarity`.

    Map:
        None.

    Raises:
        ValueError: ``head_dim`` or ``num_heads`` is below 1.

    Reference:
        Luong, Pham, Manning 2015, "Effective Approaches to Attention-based Neural Machine
        Translation", eq. 8, "dot", https://arxiv.org/abs/1508.04025. Differs from: nothing.

    Example:
        >>> Dot(3)(torch.ones(1, 1, 2, 3), torch.ones(1, 1, 5, 3))[0, 0, 0]
        tensor([3., 3., 3., 3., 3.])
    """

    head_local = True

    def plain_scale(self, width: int) -> float | None:
        return 1.0

    def dot_form(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        return q, k, None


class ScaledDot(InnerProduct):
    r"""The inner product over the root of its width, and over a learned temperature if wanted.

    .. math::
        e_{ij} = \frac{q_i \cdot k_j}{T_h \sqrt{D}}

    Args:
        head_dim: D.
        num_heads: H.
        learned_temperature: Learn :math:`T_h = e^{t_h}` per head, one at first.

    Shape:
        As :class:`Similarity`.

    Map:
        None.

    Raises:
        ValueError: ``head_dim`` or ``num_heads`` is below 1.

    Reference:
        Vaswani et al. 2017, "Attention Is All You Need", eq. 1, https://arxiv.org/abs/1706.03762.
        Differs from: the temperature, which the paper has not.

    Example:
        >>> ScaledDot(4)(torch.ones(1, 1, 1, 4), torch.ones(1, 1, 2, 4))
        tensor([[[[2., 2.]]]])
    """

    head_local = True

    def __init__(self, head_dim: int, num_heads: int = 1, *, learned_temperature: bool = False):
        super().__init__(head_dim, num_heads)
        self.log_temperature: nn.Parameter | None = None
        if learned_temperature:
            self.log_temperature = nn.Parameter(torch.zeros(num_heads, 1, 1))

    def plain_scale(self, width: int) -> float | None:
        return width**-0.5 if self.log_temperature is None else None

    def dot_form(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        scale = q.shape[-1] ** -0.5
        if self.log_temperature is not None:
            scale = scale * torch.exp(-self.log_temperature)
        return (q * scale).to(q.dtype), k, None


class Cosine(InnerProduct):
    r"""The cosine of the angle, times a learned factor.

    .. math::
        e_{ij} = \tau_h \frac{q_i \cdot k_j}{\|q_i\| \|k_j\|}, \qquad \tau_h = \min(e^{s_h}, 100)

    Args:
        head_dim: D.
        num_heads: H.

    Shape:
        As :class:`Similarity`; the scores lie in [-tau, tau], tau = 10 at first.

    Map:
        None.

    Raises:
        ValueError: ``head_dim`` or ``num_heads`` is below 1.

    Reference:
        Liu et al. 2021, "Swin Transformer V2", eq. 2, https://arxiv.org/abs/2111.09883; the bound
        of 100 is that of the authors' code. Differs from: nothing (the paper writes a division by a
        tau not below 0.01).

    Example:
        >>> Cosine(3)(torch.ones(1, 1, 1, 3), torch.ones(1, 1, 1, 3)).detach().round()
        tensor([[[[10.]]]])
    """

    head_local = True

    def __init__(self, head_dim: int, num_heads: int = 1):
        super().__init__(head_dim, num_heads)
        self.logit_scale = nn.Parameter(torch.full((num_heads, 1, 1), math.log(10.0)))

    def dot_form(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        tau = self.logit_scale.clamp(max=math.log(100.0)).exp()
        wide_q = F.normalize(widen(q), dim=-1) * tau
        wide_k = F.normalize(widen(k), dim=-1)
        return wide_q.to(q.dtype), wide_k.to(k.dtype), None


class Bilinear(InnerProduct):
    r"""A learned form between query and key.

    .. math::
        e_{ij} = q_i^\top W_h\, k_j

    Args:
        head_dim: D, the width of a query.
        num_heads: H.
        key_dim: Width of a key; None is ``head_dim``.

    Shape:
        As :class:`Similarity`, with keys (B, H, Nk, ``key_dim``).

    Map:
        None.

    Raises:
        ValueError: a size is below 1.

    Reference:
        Luong, Pham, Manning 2015, eq. 8, "general", https://arxiv.org/abs/1508.04025. Differs from:
        W starts as the unit matrix over the root of D, that is, as the scaled inner product.

    Example:
        >>> Bilinear(2, key_dim=3)(torch.ones(1, 1, 5, 2), torch.ones(1, 1, 7, 3)).shape
        torch.Size([1, 1, 5, 7])
    """

    head_local = True

    def __init__(self, head_dim: int, num_heads: int = 1, *, key_dim: int | None = None):
        super().__init__(head_dim, num_heads)
        self.key_dim = head_dim if key_dim is None else key_dim
        if self.key_dim < 1:
            raise ValueError(f"key_dim must be at least 1; got {key_dim}")
        self.weight = nn.Parameter(
            torch.eye(head_dim, self.key_dim).repeat(num_heads, 1, 1) / math.sqrt(head_dim)
        )

    def dot_form(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        return q @ self.weight, k, None
