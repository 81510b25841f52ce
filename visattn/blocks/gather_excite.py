"""Gather-excite: a gate per channel and neighborhood, from the average or from strided convolutions."""

from torch import Tensor, nn
from torch.nn import functional as F

from visattn.blocks.parts.check import hidden_width, require_choice, require_map, require_positive
from visattn.blocks.parts.norm import make_norm
from visattn.blocks.parts.pool import axis_mean
from visattn.blocks.parts.products import scaled
from visattn.core.tap import Tap

EXTENTS = (0, 2, 4, 8)
PARAMETERS = ("none", "gather", "both")


class GatherExcite(nn.Module):
    r"""Rescale each channel by a gate gathered over neighborhoods of e positions and spread back to them.

    .. math::
        y = x \odot \sigma\bigl(\mathrm{up}(E(G(x)))\bigr)

    G averages over (2e - 1) x (2e - 1) positions with stride e (or over all positions), or is a
    chain of depthwise 3 x 3 convolutions with stride 2; E is the identity or a bottleneck of 1 x 1
    convolutions; up repeats the nearest.

    Args:
        channels: C, the width of the input.
        extent: e, one of 2, 4, 8, or 0 for the whole map.
        parameters: ``"none"`` (the paper's theta minus), ``"gather"`` (theta) or ``"both"`` (theta
            plus).
        reduction: r of the bottleneck of ``"both"``: the hidden width is ``max(1, C // r)``.
        size: (H, W) of the maps, needed for a learned gather over the whole map and for nothing
            else.
        norm: Of the learned gather: ``"batch"``, ``"layer"`` or ``"none"``.

    Shape:
        - Input: (B, C, H, W), any H and W from 1 up; exactly ``size`` where that is given.
        - Output: as the input.

    Map:
        ``tap``, kind spatial: (B, C, H, W), or (B, C, 1, 1) over the whole map; values in (0, 1),
        no sum.

    Raises:
        ValueError: An argument is out of its range, ``size`` is missing, or a map is not of that
            size; with batch norm over the whole map also in training on a single image.

    Reference:
        Hu et al. 2018, "Gather-Excite: Exploiting Feature Context in Convolutional Neural
        Networks", https://arxiv.org/abs/1810.12348. Differs from the authors' code (Caffe) in:
        nothing known.

    Example:
        >>> import torch
        >>> GatherExcite(12, extent=2)(torch.rand(2, 12, 7, 11)).shape
        torch.Size([2, 12, 7, 11])
    """

    def __init__(
        self,
        channels: int,
        *,
        extent: int = 0,
        parameters: str = "none",
        reduction: int = 16,
        size: tuple[int, int] | None = None,
        norm: str = "batch",
    ):
        super().__init__()
        require_positive(channels=channels)
        require_choice("extent", extent, EXTENTS)
        require_choice("parameters", parameters, PARAMETERS)
        if (size is None) == (extent == 0 and parameters != "none"):
            raise ValueError(
                f"size goes with a learned gather over the whole map (extent=0) only; got {size}"
            )
        self.channels, self.extent, self.size = channels, extent, size
        self.gather = None if parameters == "none" else _gather(channels, extent, size, norm)
        self.excite = nn.Identity()
        if parameters == "both":
            hidden = hidden_width(channels, reduction)
            self.excite = nn.Sequential(
                nn.Conv2d(channels, hidden, 1), nn.ReLU(), nn.Conv2d(hidden, channels, 1)
            )
        self.gate = nn.Sigmoid()
        self.tap = Tap("spatial")

    def forward(self, x: Tensor) -> Tensor:
        require_map(x, self.channels)
        if self.size is not None and tuple(x.shape[2:]) != tuple(self.size):
            raise ValueError(
                f"input must be (B, {self.channels}, {self.size[0]}, {self.size[1]}); got {tuple(x.shape)}"
            )
        gate = self.gate(self.excite(self._gathered(x)))
        if self.extent:
            gate = F.interpolate(gate, size=x.shape[2:])
        return scaled(x, self.tap(gate))

    def _gathered(self, x: Tensor) -> Tensor:
        if self.gather is not None:
            return self.gather(x)
        if self.extent == 0:
            return axis_mean(x, (2, 3))
        e = self.extent
        return F.avg_pool2d(x, 2 * e - 1, stride=e, padding=e - 1, count_include_pad=False)


def _gather(channels: int, extent: int, size: tuple[int, int] | None, norm: str) -> nn.Sequential:
    """One depthwise convolution over the whole map, or log2(extent) strided ones with ReLU between them."""
    if extent == 0:
        return nn.Sequential(
            nn.Conv2d(channels, channels, size, groups=channels, bias=False),
            make_norm(norm, channels),
        )
    layers = []
    for _ in range(extent.bit_length() - 1):
        conv = nn.Conv2d(channels, channels, 3, stride=2, padding=1, groups=channels, bias=False)
        layers += [conv, make_norm(norm, channels), nn.ReLU()]
    return nn.Sequential(*layers[:-1])
