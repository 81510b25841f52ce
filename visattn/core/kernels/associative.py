"""The associative evaluation: (K^T V) first, linear in the number of tokens."""

from torch import Tensor


def associative(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None,
    absolute: bool,
) -> Tensor:
    """Return m for alpha = q k^T / Nk, or, with ``absolute``, q k^T over its row sum.

    Args:
        q: (B, H, Nq, D) of the inner-product form; with ``absolute``, not negative.
        k: (B, H, Nk, D), likewise.
        v: (B, H, Nk, Dv).
        key_mask: (B or 1, H or 1, 1, Nk), True where a key takes part, or None.
        absolute: Divide by the row sum instead of the number of keys.
    """
    if key_mask is not None:
        # A key of zeros adds nothing to either product: (.., 1, Nk) -> (.., Nk, 1)
        k = k.masked_fill(~key_mask.transpose(2, 3), 0)
    summary = k.transpose(2, 3) @ v  # (B, H, D, Dv)
    m = q @ summary
    if absolute:
        row_sum = q @ k.sum(2, keepdim=True).transpose(2, 3)  # (B, H, Nq, 1)
        return m / row_sum.masked_fill(row_sum == 0, 1)
    if key_mask is None:
        return m / k.shape[2]
    return m / key_mask.sum(-1, keepdim=True).clamp(min=1)
