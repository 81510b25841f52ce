"""Spreads that stay accurate in half precision, away from zero and where only one value is left."""

import torch
from torch import Tensor

from visattn.blocks.parts.pool import axis_mean, wide


def centered(x: Tensor, axis: int | tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """`x` minus its mean over `axis`, that mean, and the root of the sum of squares around it, axes kept.

    The norm does not cancel as a difference of squares does, and its gradient where all values
    agree is zero, not NaN.
    """
    mean = axis_mean(x, axis, dtype=wide(x))
    rest = x - mean
    return rest, mean, torch.linalg.vector_norm(rest, dim=axis, keepdim=True)


def root(number: int, like: Tensor) -> Tensor:
    """The square root of a size, as a scalar tensor: the root of a symbolic number has no counterpart in ONNX."""
    return (like.new_ones(()) * number).sqrt()
