"""Between maps (B, C, H, W) and tokens (B, H, N, D), in the memory format at hand."""

import torch
from torch import Tensor


def is_channels_last(x: Tensor) -> bool:
    """Whether x lies in memory channels last, and not in both formats at once."""
    return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


def like_format(y: Tensor, x: Tensor) -> Tensor:
    """y in the memory format of x."""
    return y.contiguous(memory_format=torch.channels_last if is_channels_last(x) else torch.contiguous_format)


def to_tokens(x: Tensor, num_heads: int = 1) -> Tensor:
    """(B, C, H, W) -> (B, num_heads, H W, C / num_heads), contiguous: the fused kernel wants channels side by side."""
    return to_channels(x, num_heads).transpose(2, 3).contiguous()


def to_channels(x: Tensor, num_heads: int = 1) -> Tensor:
    """(B, C, H, W) -> (B, num_heads, C / num_heads, H W): the channels as tokens."""
    return x.flatten(2).unflatten(1, (num_heads, -1))


def to_map(m: Tensor, x: Tensor) -> Tensor:
    """(B, heads, N, D) -> (B, heads D, H, W), with H, W and memory format of x."""
    if is_channels_last(x):
        return m.transpose(1, 2).flatten(2).transpose(1, 2).unflatten(2, x.shape[2:])
    return m.transpose(2, 3).flatten(1, 2).unflatten(2, x.shape[2:])
