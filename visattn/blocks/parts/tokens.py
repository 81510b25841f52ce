"""Between maps (B, C, H, W) and tokens (B, heads, N, D), N = H W, in either memory format."""

import torch
from torch import Tensor, nn

from visattn.blocks.parts.products import plain, product

CACHED_SCORES = 32 * 2**20
"""Bytes of a score matrix of one wide head that a CPU evaluates faster whole: about its cache."""


def map_size(x: Tensor) -> tuple[int, int]:
    """Return the (H, W) of a map."""
    height, width = x.shape[2:]
    return height, width


def is_channels_last(x: Tensor) -> bool:
    """Tell whether x is channels_last; a tensor that fits both formats is not."""
    return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


def like_format(y: Tensor, x: Tensor) -> Tensor:
    """Return y in the memory format of x."""
    if is_channels_last(x):
        return y.contiguous(memory_format=torch.channels_last)
    return y.contiguous(memory_format=torch.contiguous_format)


def to_channels(x: Tensor, num_heads: int = 1) -> Tensor:
    """Make the channels tokens: (B, C, H, W) -> (B, heads, C / heads, N)."""
    return x.flatten(2).unflatten(1, (num_heads, -1))


def to_tokens(x: Tensor, num_heads: int = 1) -> Tensor:
    """Make the positions tokens: (B, C, H, W) -> (B, heads, N, C / heads)."""
    # Contiguous, because the fused kernel needs the channels of a token side by side.
    return to_channels(x, num_heads).transpose(2, 3).contiguous()


def to_map(m: Tensor, x: Tensor) -> Tensor:
    """(B, heads, N, D) -> (B, heads D, H, W), with H, W and memory format of x."""
    if is_channels_last(x):
        # (B, heads, N, D) -> (B, N, heads D) -> (B, heads D, N), channels side by side in memory
        flat = m.transpose(1, 2).flatten(2).transpose(1, 2)
    else:
        # (B, heads, N, D) -> (B, heads, D, N) -> (B, heads D, N)
        flat = m.transpose(2, 3).flatten(1, 2)
    return flat.unflatten(2, x.shape[2:])


def project(
    x: Tensor,
    *convs: nn.Conv2d,
) -> tuple[Tensor, ...]:
    """Apply 1 x 1 convolutions to x; returns flat maps (B, O, N).

    All of them are one product, which costs less than one product each.
    """
    if plain(x, convs[0].weight):
        return tuple(conv(x).flatten(2) for conv in convs)
    weight, bias = _stack_convs(convs)
    # (B, O, C) @ (B, C, N) -> (B, O, N), O the sum over the convolutions
    weights = weight.expand(x.size(0), -1, -1)
    y = product(weights, x.flatten(2))
    if bias is not None:
        y = y.add_(bias[:, None])
    return y.split([conv.out_channels for conv in convs], 1)


def project_tokens(
    x: Tensor,
    *convs: nn.Conv2d,
    num_heads: int = 1,
) -> tuple[Tensor, ...]:
    """Apply 1 x 1 convolutions to x; returns tokens (B, heads, N, O / heads).

    All of them are one product, which gives tokens without a copy.
    """
    if plain(x, convs[0].weight):
        return tuple(to_tokens(conv(x), num_heads) for conv in convs)
    weight, bias = _stack_convs(convs)
    # (B, N, C) @ (B, C, O) -> (B, N, O)
    weights = weight.t().expand(x.size(0), -1, -1)
    y = product(x.flatten(2).mT, weights)
    if bias is not None:
        y = y.add_(bias)
    widths = [conv.out_channels for conv in convs]
    # (B, N, O) -> (B, N, heads, O / heads) -> (B, heads, N, O / heads)
    heads = [tokens.unflatten(2, (num_heads, -1)) for tokens in y.split(widths, 2)]
    return tuple(tokens.transpose(1, 2) for tokens in heads)


def project_back(
    m: Tensor,
    conv: nn.Conv2d,
    x: Tensor,
) -> Tensor:
    """Apply a 1 x 1 convolution to tokens (B, heads, N, D); returns a map in the format of x."""
    if plain(m, x, conv.weight) or is_channels_last(x):
        return conv(to_map(m, x))
    weight = conv.weight.flatten(1)
    # (B, O, heads D) @ (B, heads D, N) -> (B, O, N)
    weights = weight.expand(x.size(0), -1, -1)
    y = product(weights, m.transpose(2, 3).flatten(1, 2))
    if conv.bias is not None:
        y = y.add_(conv.bias[:, None])
    return y.unflatten(2, x.shape[2:])


def _stack_convs(
    convs: tuple[nn.Conv2d, ...],
) -> tuple[Tensor, Tensor | None]:
    """Concatenate the weights (O, C) of 1 x 1 convolutions, and their biases (O), if any."""
    weight = torch.cat([conv.weight.flatten(1) for conv in convs])
    biases = [conv.bias for conv in convs if conv.bias is not None]
    if not biases:
        return weight, None
    return weight, torch.cat(biases)
