"""MCA: three gates, along channels, rows and columns, each from means and standard deviations over the other axes."""

import math

import torch
from torch import Tensor, nn

from visattn.blocks.parts.check import require_map, require_odd, require_positive
from visattn.blocks.parts.moments import centered, root
from visattn.blocks.parts.products import scaled_by_sum
from visattn.core.tap import Tap


class AxisGate(nn.Module):
    """A gate along one axis from the mean and the standard deviation (B, L) of each slice."""

    def __init__(self, kernel_size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(2))
        self.conv = nn.Conv1d(1, 1, kernel_size, padding=kernel_size // 2, bias=False)

    def forward(self, mean: Tensor, deviation: Tensor) -> Tensor:
        of_mean, of_deviation = self.weight.sigmoid() + 0.5
        squeezed = (of_mean * mean + of_deviation * deviation).to(self.weight.dtype)
        return self.conv(squeezed.unsqueeze(1)).squeeze(1).sigmoid()


class MCA(nn.Module):
    r"""Average three gates: one value per channel, one per row, one per column.

    .. math::
        y_{cij} = x_{cij}\,\tfrac{1}{3}\bigl(\alpha^C_c + \alpha^H_i + \alpha^W_j\bigr), \qquad
        \alpha = \sigma\bigl(k * [(\tfrac{1}{2} + \sigma(a))\,\mu + (\tfrac{1}{2} + \sigma(b))\,s]\bigr)

    with mean μ and (unbiased) standard deviation s of each slice of the axis, and a, b, k learned
    for each gate.

    Args:
        channels: C, the width of the input.
        kernel_size: Extent of k along the channels, odd; None takes the odd number at or below
            round((log2(C) - 1) / 1.5), and at least 1.
        spatial_kernel_size: Extent of k along rows and columns, odd.
        channel_gate: Whether the channels have a gate; without it the other two are averaged.

    Shape:
        - Input: (B, C, H, W), any H and W from 1 up; the standard deviation of a single value
          counts as zero.
        - Output: as the input.

    Map:
        ``tap_h``, ``tap_w``, kind spatial: (B, 1, H, 1), (B, 1, 1, W), and ``tap_c``, kind channel:
            (B, C, 1, 1),
        values in (0, 1), no sum.

    Raises:
        ValueError: A kernel size is even.

    Reference:
        Yu, Zhang, Cheng, Song, Tang 2023, "MCA: Multidimensional collaborative attention in deep
        convolutional neural networks for image recognition",
        https://doi.org/10.1016/j.engappai.2023.107079. Differs from the authors' code
        in: its ``no_spatial``, which leaves the channel gate out, is ``channel_gate=False``; few
            channels and single
        values are defined (there an error and NaN).

    Example:
        >>> import torch
        >>> MCA(12)(torch.rand(2, 12, 7, 11)).shape
        torch.Size([2, 12, 7, 11])
    """

    def __init__(
        self,
        channels: int,
        *,
        kernel_size: int | None = None,
        spatial_kernel_size: int = 3,
        channel_gate: bool = True,
    ):
        super().__init__()
        require_positive(channels=channels)
        kernel_size = _adaptive_kernel(channels) if kernel_size is None else kernel_size
        require_odd(kernel_size=kernel_size, spatial_kernel_size=spatial_kernel_size)
        self.channels = channels
        self.gate_h = AxisGate(spatial_kernel_size)
        self.gate_w = AxisGate(spatial_kernel_size)
        self.gate_c = AxisGate(kernel_size) if channel_gate else None
        self.tap_h = Tap("spatial")
        self.tap_w = Tap("spatial")
        self.tap_c = Tap("channel") if channel_gate else None

    def forward(self, x: Tensor) -> Tensor:
        require_map(x, self.channels)
        # Two centered passes give all three deviations: squares around a coarser mean are the
        # squares around each finer mean plus the squares of the finer means around the coarser one.
        row_mean, row_norm = centered(x, 3)[1:]
        column_mean, column_norm = centered(x, 2)[1:]
        height, width = x.size(2), x.size(3)
        gate_h = self.gate_h(*_pooled(row_mean[..., 0], row_norm[..., 0], 1, width))
        gate_w = self.gate_w(*_pooled(column_mean[:, :, 0], column_norm[:, :, 0], 1, height))
        gate_h = self.tap_h(gate_h[:, None, :, None].to(x.dtype))
        gate_w = self.tap_w(gate_w[:, None, None, :].to(x.dtype))
        if self.gate_c is None:
            return scaled_by_sum(x, gate_h / 2, gate_w / 2)
        gate_c = self.gate_c(*_pooled(row_mean[..., 0], row_norm[..., 0], 2, width))
        gate_c = self.tap_c(gate_c[:, :, None, None].to(x.dtype))
        return scaled_by_sum(x, gate_h / 3, gate_w / 3, gate_c / 3)


def _pooled(mean: Tensor, norm: Tensor, axis: int, count: int) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation over `axis` of (B, C, L), when each entry stands for `count` values."""
    rest, total, _ = centered(mean, axis)
    n = torch.sym_max(mean.size(axis) * count - 1, 1)
    # A norm of both parts keeps the gradient finite where nothing varies; the root of their squares
    # would give NaN.
    parts = torch.cat((norm, rest * root(count, rest)), axis)
    return total.squeeze(axis), torch.linalg.vector_norm(parts, dim=axis) / root(n, norm)


def _adaptive_kernel(channels: int) -> int:
    """The odd extent that the paper gives a number of channels."""
    extent = round(abs((math.log2(channels) - 1) / 1.5))
    return max(1, extent if extent % 2 else extent - 1)
