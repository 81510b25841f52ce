"""Normalization-based attention: batch norm's own scales say which channels matter."""

from torch import Tensor, nn
from torch.func import functional_call

from visattn.blocks.parts.check import require_map, require_positive
from visattn.blocks.parts.norm import BatchNorm
from visattn.core.tap import Tap


class NormalizationAttention(nn.Module):
    r"""Rescale each value by a gate from its batch-normalized self, weighted by the share of its channel's scale.

    .. math::
        y_c = \sigma\Bigl(\frac{|\gamma_c|}{\sum_d |\gamma_d|}\, \mathrm{BN}(x)_c\Bigr)\, x_c

    gamma is the scale of the same batch normalization.

    Args:
        channels: C, the width of the input.
        detach: Whether no gradient passes through the shares, as in the authors' code.
        eps, momentum: Of the batch normalization.

    Shape:
        - Input: (B, C, H, W), any H and W from 1 up.
        - Output: as the input.

    Map:
        ``tap``, kind spatial: (B, C, H, W), each value in (0, 1); they do not sum to one.

    Raises:
        ValueError: ``channels`` is below 1; in training on one single position.

    Reference:
        Liu et al. 2021, "NAM: Normalization-based Attention Module", the channel part,
        https://arxiv.org/abs/2111.12419.
        Differs from the authors' code in: that cuts the gradient of the shares (``detach=True``); a
        later version of it puts a ReLU before the sigmoid, for which there is no option.

    Example:
        >>> import torch
        >>> NormalizationAttention(12)(torch.rand(2, 12, 7, 11)).shape
        torch.Size([2, 12, 7, 11])
    """

    def __init__(
        self, channels: int, *, detach: bool = False, eps: float = 1e-5, momentum: float = 0.1
    ):
        super().__init__()
        require_positive(channels=channels)
        self.channels, self.detach = channels, detach
        self.norm = BatchNorm(channels, eps=eps, momentum=momentum)
        self.gate = nn.Sigmoid()
        self.tap = Tap("spatial")

    def forward(self, x: Tensor) -> Tensor:
        require_map(x, self.channels)
        weight, bias = self.norm.weight, self.norm.bias
        share = weight.abs() / weight.abs().sum()
        share = share.detach() if self.detach else share
        # The share is folded into the affine part of the normalization: one full-size pass less.
        # The norm itself runs, so that its own mode counts and whatever stands in its place may
        # work as it does.
        normed = functional_call(self.norm, {"weight": weight * share, "bias": bias * share}, (x,))
        return x * self.tap(self.gate(normed))
