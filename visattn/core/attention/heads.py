"""Between tokens (B, N, H * D) and heads (B, H, N, D); masks over tokens for the formula."""

from torch import Tensor

from visattn.core.formula import Attend


def width_per_head(dim: int, num_heads: int) -> int:
    """Return D, or refuse heads that do not divide the width."""
    if num_heads < 1 or dim < 1 or dim % num_heads:
        raise ValueError(f"num_heads must divide dim; got num_heads={num_heads}, dim={dim}")
    return dim // num_heads


def split_heads(x: Tensor, num_heads: int) -> Tensor:
    """(B, N, H * D) -> (B, H, N, D)."""
    return x.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def split_projections(x: Tensor, count: int, num_heads: int) -> tuple[Tensor, ...]:
    """Take joint projections apart: (B, N, count * H * D) -> count x (B, H, N, D)."""
    parts = x.unflatten(-1, (count, num_heads, -1))  # (B, N, count, H, D)
    return parts.permute(2, 0, 3, 1, 4).unbind(0)


def merge_heads(m: Tensor) -> Tensor:
    """(B, H, N, D) -> (B, N, H * D)."""
    return m.transpose(1, 2).flatten(2)


def key_mask(mask: Tensor | None) -> Tensor | None:
    """Give a mask over keys (B, M) the axes of heads and queries; leave any other as it is."""
    if mask is None or mask.ndim != 2:
        return mask
    return mask[:, None, None]  # (B, 1, 1, M)


def token_mask(mask: Tensor | None, attend: Attend) -> Tensor | None:
    """Give a mask over tokens (B, N) the axes of heads and queries; leave any other as it is.

    Where rows depend on each other, a masked token must not act as a query either.
    """
    if mask is None or mask.ndim != 2:
        return mask
    keys = mask[:, None, None]  # (B, 1, 1, N)
    if is_row_local(attend):
        return keys
    queries = mask[:, None, :, None]  # (B, 1, N, 1)
    return keys & queries


def is_row_local(attend: Attend) -> bool:
    """Whether the weights of a query depend on no other query."""
    return attend.normalize is None or attend.normalize.row_local
