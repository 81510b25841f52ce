"""Similarities by distance."""

import math

import torch
from torch import Tensor, nn

from visattn.core.similarity.definition import InnerProduct, Similarity


class NegativeL2(InnerProduct):
    r"""Minus the squared Euclidean distance, times a learned factor.

    .. math::
        e_{ij} = -\gamma_h \|q_i - k_j\|_2^2

    Args:
        head_dim: D.
        num_heads: H.

    Shape:
        As :class:`Similarity`; the scores are not positive.

    Map:
        None.

    Raises:
        ValueError: ``head_dim`` or ``num_heads`` is below 1.

    Reference:
        Tsai et al. 2019, "Transformer Dissection", https://arxiv.org/abs/1908.11775 (the RBF
        kernel). Differs from: gamma is learned per head and starts at 1 / (2 sqrt(D)), with which
        keys of equal length give the scaled inner product.

    Example:
        >>> NegativeL2(4)(torch.zeros(1, 1, 1, 4), torch.ones(1, 1, 1, 4)).detach()
        tensor([[[[-1.]]]])
    """

    head_local = True

    def __init__(self, head_dim: int, num_heads: int = 1):
        super().__init__(head_dim, num_heads)
        self.log_gamma = nn.Parameter(
            torch.full((num_heads, 1, 1), -math.log(2 * math.sqrt(head_dim)))
        )

    def dot_form(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        # A common offset cancels exactly; removing it keeps the digits of large q and k in float32.
        center = k.mean(-2, keepdim=True)
        q = q - center
        k = k - center
        gamma = self.log_gamma.exp()
        # -|q - k|^2 = 2 q k - |q|^2 - |k|^2: both squares become one more channel each.
        square_q = q.square().sum(-1, keepdim=True)  # (B, H, Nq, 1)
        square_k = k.square().sum(-1, keepdim=True)  # (B, H, Nk, 1)
        unit = k.new_ones(())
        wide_q = torch.cat([2 * q, -square_q, unit.expand(square_q.shape)], -1) * gamma
        wide_k = torch.cat([k, unit.expand(square_k.shape), -square_k], -1)
        return wide_q.to(q.dtype), wide_k, None


class Laplacian(Similarity):
    r"""Minus the sum of absolute differences, times a learned factor.

    .. math::
        e_{ij} = -\gamma_h \|q_i - k_j\|_1

    Args:
        head_dim: D.
        num_heads: H.

    Shape:
        As :class:`Similarity`; the scores are not positive.

    Map:
        None.

    Raises:
        ValueError: ``head_dim`` or ``num_heads`` is below 1.

    Reference:
        Kim et al. 2019, "Attentive Neural Processes", https://arxiv.org/abs/1901.05761 ("Laplace").
        Differs from: gamma is learned per head and starts at 1 / sqrt(D).

    Example:
        >>> Laplacian(4)(torch.zeros(1, 1, 1, 4), torch.ones(1, 1, 1, 4)).detach()
        tensor([[[[-2.]]]])
    """

    head_local = True

    def __init__(self, head_dim: int, num_heads: int = 1):
        super().__init__(head_dim, num_heads)
        self.tile_width = head_dim
        self.log_gamma = nn.Parameter(torch.full((num_heads, 1, 1), -math.log(math.sqrt(head_dim))))

    def forward(self, q: Tensor, k: Tensor) -> Tensor:
        # (B, H, Nq, 1, D) - (B, H, 1, Nk, D) -> (B, H, Nq, Nk)
        distance = (q[..., :, None, :] - k[..., None, :, :]).abs().sum(-1)
        return -self.log_gamma.exp() * distance
