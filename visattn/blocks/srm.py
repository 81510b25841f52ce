"""Style-based recalibration: a gate per channel from its own mean and standard deviation."""

import torch
from torch import Tensor, nn

from visattn.blocks.parts.check import require_map, require_positive
from visattn.blocks.parts.norm import make_norm
from visattn.blocks.parts.pool import global_mean_std
from visattn.blocks.parts.products import scaled
from visattn.core.tap import Tap


class StyleRecalibration(nn.Module):
    r"""Rescale each channel by a gate from its mean and standard deviation, without mixing channels.

    .. math::
        y_c = \sigma\bigl(\mathrm{BN}(w_{c1}\, \mu_c + w_{c2}\, \sigma_c)\bigr)\, x_c

    Args:
        channels: C, the width of the input.
        unbiased: Whether the variance divides by HW - 1, as the authors' code does.
        norm: ``"batch"``, ``"layer"`` or ``"none"``.

    Shape:
        - Input: (B, C, H, W), any H and W from 1 up (two positions at least if ``unbiased``).
        - Output: as the input.

    Map:
        ``tap``, kind channel: (B, C, 1, 1), each value in (0, 1); they do not sum to one.

    Raises:
        ValueError: ``channels`` is below 1 or ``norm`` unknown; in training on a single image with
            batch norm; a map of one position if ``unbiased``.

    Reference:
        Lee, Kim, Nam 2019, "SRM: A Style-based Recalibration Module for Convolutional Neural
        Networks", https://arxiv.org/abs/1903.10829. Differs from the authors' code in: the paper's
        variance divides by HW, the code's by HW - 1 (``unbiased=True``); 1e-5 is added to the
        variance, so that a constant channel has a gradient.

    Example:
        >>> import torch
        >>> StyleRecalibration(12)(torch.rand(2, 12, 7, 11)).shape
        torch.Size([2, 12, 7, 11])
    """

    def __init__(self, channels: int, *, unbiased: bool = False, norm: str = "batch"):
        super().__init__()
        require_positive(channels=channels)
        self.channels, self.unbiased = channels, unbiased
        self.weight = nn.Parameter(torch.zeros(channels, 2))
        self.norm = make_norm(norm, channels)
        self.gate = nn.Sigmoid()
        self.tap = Tap("channel")

    def forward(self, x: Tensor) -> Tensor:
        require_map(x, self.channels)
        if self.unbiased and x.size(2) * x.size(3) == 1:
            raise ValueError(f"unbiased needs two positions at least; got {tuple(x.shape)}")
        mean, std = global_mean_std(x, unbiased=self.unbiased)
        style = (self.weight[:, 0] * mean + self.weight[:, 1] * std).to(x.dtype)
        return scaled(x, self.tap(self.gate(self.norm(style[:, :, None, None]))))
