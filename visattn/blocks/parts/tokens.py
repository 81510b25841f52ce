"""Between maps (B, C, H, W) and tokens (B, H, N, D), in the memory format at hand."""

import torch
from torch import Tensor, nn

from visattn.blocks.parts.products import plain, product


def is_channels_last(x: Tensor) -> bool:
    """Whether x lies in memory channels last, and not in both formats at once."""
    return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


def like_format(y: Tensor, x: Tensor) -> Tensor:
    """y in the memory format of x."""
    return y.contiguous(
        memory_format=torch.channels_last if is_channels_last(x) else torch.contiguous_format
    )


def to_tokens(x: Tensor, num_heads: int = 1) -> Tensor:
    """(B, C, H, W) -> (B, num_heads, H W, C / num_heads), contiguous: the fused kernel wants channels side by side."""
    return to_channels(x, num_heads).transpose(2, 3).contiguous()


def project(x: Tensor, *convs: nn.Conv2d) -> tuple[Tensor, ...]:
    """The flat maps (B, O, N) of convolutions 1 x 1, all by one product, which costs less than one each."""
    if plain(x, convs[0].weight):
        return tuple(conv(x).flatten(2) for conv in convs)
    weight, bias = _stacked(convs)
    y = product(weight.expand(x.size(0), -1, -1), x.flatten(2))
    y = y if bias is None else y.add_(bias[:, None])
    return y.split([conv.out_channels for conv in convs], 1)


def project_tokens(x: Tensor, *convs: nn.Conv2d, num_heads: int = 1) -> tuple[Tensor, ...]:
    """The tokens (B, num_heads, N, O / num_heads) of convolutions 1 x 1, all by one product and without a copy."""
    if plain(x, convs[0].weight):
        return tuple(to_tokens(conv(x), num_heads) for conv in convs)
    weight, bias = _stacked(convs)
    y = product(x.flatten(2).mT, weight.t().expand(x.size(0), -1, -1)).add_(bias)
    parts = y.split([conv.out_channels for conv in convs], 2)
    return tuple(part.unflatten(2, (num_heads, -1)).transpose(1, 2) for part in parts)


def project_back(m: Tensor, conv: nn.Conv2d, x: Tensor) -> Tensor:
    """The map that a convolution 1 x 1 makes of tokens (B, heads, N, D), with H, W and memory format of x."""
    if plain(m, x, conv.weight) or is_channels_last(x):
        return conv(to_map(m, x))
    weight = conv.weight.flatten(1).expand(x.size(0), -1, -1)
    y = product(weight, m.transpose(2, 3).flatten(1, 2)).add_(conv.bias[:, None])
    return y.unflatten(2, x.shape[2:])


def _stacked(convs: tuple[nn.Conv2d, ...]) -> tuple[Tensor, Tensor | None]:
    """The weights (O, C) and biases (O), if there are any, of convolutions 1 x 1, one below the other."""
    weight = torch.cat([conv.weight.flatten(1) for conv in convs])
    return weight, None if convs[0].bias is None else torch.cat([conv.bias for conv in convs])


def to_channels(x: Tensor, num_heads: int = 1) -> Tensor:
    """(B, C, H, W) -> (B, num_heads, C / num_heads, H W): the channels as tokens."""
    return x.flatten(2).unflatten(1, (num_heads, -1))


def to_map(m: Tensor, x: Tensor) -> Tensor:
    """(B, heads, N, D) -> (B, heads D, H, W), with H, W and memory format of x."""
    if is_channels_last(x):
        return m.transpose(1, 2).flatten(2).transpose(1, 2).unflatten(2, x.shape[2:])
    return m.transpose(2, 3).flatten(1, 2).unflatten(2, x.shape[2:])
