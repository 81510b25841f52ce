"""Weighted sums over the neighborhood of every position."""

import torch
import torch.nn.functional as F
from torch import Tensor


def weighted_shifts(v: Tensor, weights: Tensor, kernel_size: int) -> Tensor:
    r"""Add up the neighbors of every position: :math:`y_{pcg} = \sum_k w_{pcgk}\, v_{p + k, cg}`; zeros outside.

    v is (B, C, H, W); weights (B, S, G, kernel_size^2, H, W), S or G may be 1; C = S G, G varying
    fastest.
    """
    # A sum of shifted maps needs no copy of v per neighbor, neither here nor for the gradient.
    half, (height, width) = kernel_size // 2, v.shape[2:]
    groups = weights.shape[2]
    v = F.pad(v, (half,) * 4).unflatten(1, (-1, groups) if groups > 1 else (weights.shape[1], -1))
    y = None
    for k in range(kernel_size**2):
        top, left = divmod(k, kernel_size)
        shifted = v[..., top : top + height, left : left + width]
        w = weights[:, :, :, k]
        y = w * shifted if y is None else torch.addcmul(y, w, shifted)
    return y.flatten(1, 2)
