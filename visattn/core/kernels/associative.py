"""The associative evaluation: (K^T V) first, linear in the number of tokens."""

from torch import Tensor


def associative(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, absolute: bool) -> Tensor:
    """Return m for alpha = q k^T / Nk, or, with ``absolute``, q k^T over its row sum (features must not be negative).

    Args:
        q: (B, H, Nq, D) of the inner-product form.
        k: (B, H, Nk, D), likewise.
        v: (B, H, Nk, Dv).
        key_mask: (B or 1, H or 1, 1, Nk), True where a key takes part, or None.
        absolute: Divide by the row sum in place of the number of keys.
    """
    if key_mask is not None:
        k = k.masked_fill(~key_mask.transpose(2, 3), 0)
    m = q @ (k.transpose(2, 3) @ v)
    if absolute:
        total = q @ k.sum(2, keepdim=True).transpose(2, 3)
        return m / total.masked_fill(total == 0, 1)
    count = k.shape[2] if key_mask is None else key_mask.sum(-1, keepdim=True).clamp(min=1)
    return m / count
