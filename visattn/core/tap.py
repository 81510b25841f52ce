"""Tap: an identity where a map leaves."""

from torch import Tensor, nn


class Tap(nn.Module):
    r"""Return the map unchanged; whoever wants to see or replace it hooks this module.

    .. math::
        y = \alpha

    Args:
        kind: What the values stand for: ``"channel"`` (one value per channel), ``"spatial"`` (one
            per position, per channel or per strip), ``"branch"`` (one per branch and channel) or
            ``"token"`` (queries by keys).

    Shape:
        - Input: channel (B, C, 1, 1); spatial (B, G, H, W), where G, H or W may be 1; branch (B, K,
          C, 1, 1), or with H, W in place of 1, 1; token (B, h, Nq, Nk).
        - Output: the input itself.

    Map:
        The input. A gate lies in the range of its activation and does not sum to one; branch and
        token weights do.

    Raises:
        ValueError: ``kind`` is none of the four.

    Reference:
        None: this is the toolkit's own seam. Differs from: nothing.

    Example:
        >>> import torch
        >>> gate = torch.rand(2, 3, 1, 1)
        >>> Tap("channel")(gate) is gate
        True
    """

    KINDS = ("channel", "spatial", "branch", "token")

    def __init__(self, kind: str):
        super().__init__()
        if kind not in self.KINDS:
            raise ValueError(f"kind must be one of {', '.join(self.KINDS)}; got {kind!r}")
        self.kind = kind

    def forward(self, alpha: Tensor) -> Tensor:
        return alpha

    def extra_repr(self) -> str:
        return repr(self.kind)
