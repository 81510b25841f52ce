"""Triplet attention: three gates, each over the plane of two axes, pooled over the third."""

import torch
from torch import Tensor, nn

from visattn.blocks.parts.check import require_map, require_odd, require_positive
from visattn.blocks.parts.norm import make_norm
from visattn.blocks.parts.plane_conv import PlaneConv
from visattn.blocks.parts.pool import max_and_mean
from visattn.blocks.parts.products import scaled_by_sum
from visattn.core.tap import Tap


class PlaneGate(nn.Module):
    r"""A gate over the plane that is left when one axis of a map is pooled away.

    .. math::
        \alpha = \sigma(\mathrm{BN}(k * [\max_d x;\; \mathrm{mean}_d\, x]))

    Args:
        kernel_size: Extent of the convolution on the plane, odd.
        norm: ``"batch"``, ``"layer"`` or ``"none"``.

    Shape:
        - Input: maximum and mean of a map (B, C, H, W) over the axis d, each with size one along
          it; d is 1, 2 or 3.
        - Output: as either.

    Map:
        ``tap``, kind spatial: the output, values in (0, 1), no sum.

    Reference:
        Misra et al. 2021, https://arxiv.org/abs/2010.03045. Differs from: nothing.

    Example:
        >>> import torch
        >>> x = torch.rand(2, 12, 7, 11)
        >>> PlaneGate(7, "batch")(x.amax(2, keepdim=True), x.mean(2, keepdim=True), 2).shape
        torch.Size([2, 12, 1, 11])
    """

    def __init__(self, kernel_size: int, norm: str):
        super().__init__()
        self.conv = PlaneConv(2, kernel_size)
        self.norm = make_norm(norm, 1, momentum=0.01)
        self.tap = Tap("spatial")

    def forward(self, highest: Tensor, mean: Tensor, axis: int) -> Tensor:
        # Only the pooled plane is turned, never the map: a turned map costs four to five passes
        # over memory.
        plane = torch.cat((highest, mean), axis).movedim(axis, 1)
        return self.tap(self.norm(self.conv(plane)).sigmoid().movedim(1, axis))


class TripletAttention(nn.Module):
    r"""Average three gates, each computed on the plane of two of the axes C, H, W.

    .. math::
        y_{cij} = x_{cij}\;\tfrac{1}{3}\bigl(\alpha^{CW}_{cj} + \alpha^{CH}_{ci} + \alpha^{HW}_{ij}\bigr),
        \qquad \alpha = \sigma(\mathrm{BN}(k * [\max_d x;\; \mathrm{mean}_d\, x]))

    where d is the axis that the plane lacks.

    Args:
        channels: C, the width of the input.
        kernel_size: Extent of the convolution on each plane, odd.
        spatial: Whether the plane (H, W) has its gate; without it the other two are averaged.
        norm: ``"batch"``, ``"layer"`` or ``"none"``.

    Shape:
        - Input: (B, C, H, W), any H and W from 1 up.
        - Output: as the input.

    Map:
        ``gate_cw.tap``, ``gate_ch.tap``, ``gate_hw.tap``, kind spatial: (B, C, 1, W), (B, C, H, 1),
        (B, 1, H, W), values in (0, 1), no sum.

    Raises:
        ValueError: ``kernel_size`` is even; or, with batch norm, one image of 1 x 1 in training.

    Reference:
        Misra, Nalamada, Arasanipalai, Hou 2021, "Rotate to Attend: Convolutional Triplet Attention
        Module", https://arxiv.org/abs/2010.03045. Differs from the authors' code in: its unused
        arguments are gone, and ``no_spatial`` is ``spatial``.

    Example:
        >>> import torch
        >>> TripletAttention(12)(torch.rand(2, 12, 7, 11)).shape
        torch.Size([2, 12, 7, 11])
    """

    def __init__(
        self, channels: int, *, kernel_size: int = 7, spatial: bool = True, norm: str = "batch"
    ):
        super().__init__()
        require_positive(channels=channels)
        require_odd(kernel_size=kernel_size)
        self.channels = channels
        self.gate_cw = PlaneGate(kernel_size, norm)
        self.gate_ch = PlaneGate(kernel_size, norm)
        self.gate_hw = PlaneGate(kernel_size, norm) if spatial else None

    def forward(self, x: Tensor) -> Tensor:
        require_map(x, self.channels)
        gates = {2: self.gate_cw, 3: self.gate_ch} | (
            {} if self.gate_hw is None else {1: self.gate_hw}
        )
        planes = max_and_mean(x, *((axis,) for axis in gates))
        weighted = [
            gate(*plane, axis) / len(gates)
            for (axis, gate), plane in zip(gates.items(), planes, strict=True)
        ]
        return scaled_by_sum(x, *weighted)
