"""Strip pooling: rows, columns and coarse grids of averages, mixed and added to the map."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from visattn.blocks.parts.check import hidden_width, require_map, require_positive
from visattn.blocks.parts.norm import make_norm
from visattn.blocks.parts.pool import axis_mean, interval_means
from visattn.core.tap import Tap


class StripPooling(nn.Module):
    r"""Add to each position what its row, its column and its neighborhoods on two coarse grids have in common.

    .. math::
        y = \mathrm{ReLU}\bigl(x + W [f_1(u_0 + \mathrm{up}\,u_1 + \mathrm{up}\,u_2);\; f_2(\alpha^h + \alpha^w)]\bigr)

    with u = k * of one narrow map, whole and averaged to two grids, and with strips
    :math:`\alpha^h_{ci} = (k_h * \bar{z}^h)_{ci}`, :math:`\alpha^w_{cj} = (k_w * \bar{z}^w)_{cj}` of another, z; f is
    ReLU, 3 x 3 convolution, norm, ReLU; every convolution has its norm. This is the paper's mixed
    pooling module.

    Args:
        channels: C, the width of the input.
        pool_sizes: Sides of the two grids.
        reduction: r, so the inner width is ``max(1, C // r)``.
        norm: ``"batch"``, ``"layer"`` or ``"none"``.

    Shape:
        - Input: (B, C, H, W), any H and W from 1 up.
        - Output: as the input.

    Map:
        ``tap_h`` and ``tap_w``, kind spatial: (B, C / r, H, 1) and (B, C / r, 1, W), any real
        values, no sum: added, not multiplied.

    Raises:
        ValueError: A size or width is below 1; or, with batch norm, one image whose H or W is 1 in
            training.

    Reference:
        Hou, Zhang, Cheng, Feng 2020, "Strip Pooling: Rethinking Spatial Pooling for Scene Parsing",
        section 3.2, https://arxiv.org/abs/2003.13328. Differs from: nothing in values (grids are
        resized bilinearly, with aligned corners); averages over grids are matrix products, so that
        sizes may vary after export.

    Example:
        >>> import torch
        >>> StripPooling(12)(torch.rand(2, 12, 7, 11)).shape
        torch.Size([2, 12, 7, 11])
    """

    def __init__(
        self,
        channels: int,
        *,
        pool_sizes: tuple[int, int] = (20, 12),
        reduction: int = 4,
        norm: str = "batch",
    ):
        super().__init__()
        require_positive(**{f"pool_sizes[{i}]": size for i, size in enumerate(pool_sizes)})
        inner = hidden_width(channels, reduction)
        self.channels = channels
        self.pool_sizes = tuple(pool_sizes)
        self.reduce_grid = _conv(channels, inner, 1, norm, act=True)
        self.reduce_strip = _conv(channels, inner, 1, norm, act=True)
        self.local = _conv(inner, inner, 3, norm)
        self.grids = nn.ModuleList(_conv(inner, inner, 3, norm) for _ in self.pool_sizes)
        self.row = _conv(inner, inner, (3, 1), norm)
        self.column = _conv(inner, inner, (1, 3), norm)
        self.mix_grid = _conv(inner, inner, 3, norm, act=True)
        self.mix_strip = _conv(inner, inner, 3, norm, act=True)
        self.expand = _conv(2 * inner, channels, 1, norm)
        self.tap_h = Tap("spatial")
        self.tap_w = Tap("spatial")

    def forward(self, x: Tensor) -> Tensor:
        require_map(x, self.channels)
        grid, strip = self.reduce_grid(x), self.reduce_strip(x)
        pyramid = self.local(grid)
        for size, conv in zip(self.pool_sizes, self.grids, strict=True):
            pyramid = pyramid + _resized(conv(_grid_means(grid, size)), grid)
        row = self.tap_h(self.row(axis_mean(strip, 3)))
        column = self.tap_w(self.column(axis_mean(strip, 2)))
        mixed = torch.cat((self.mix_grid(pyramid.relu()), self.mix_strip((row + column).relu())), 1)
        return (x + self.expand(mixed)).relu()


def _conv(
    channels: int, out: int, kernel_size: int | tuple[int, int], norm: str, *, act: bool = False
) -> nn.Sequential:
    """A convolution that keeps height and width, its norm and, if wanted, a ReLU."""
    conv = nn.Conv2d(channels, out, kernel_size, padding="same", bias=False)
    return nn.Sequential(conv, make_norm(norm, out), nn.ReLU() if act else nn.Identity())


def _grid_means(x: Tensor, size: int) -> Tensor:
    """The averages of `x` on a grid of `size` x `size`, as adaptive average pooling defines them."""
    return interval_means(x.size(2), size, x) @ x @ interval_means(x.size(3), size, x).t()


def _resized(x: Tensor, like: Tensor) -> Tensor:
    """`x` at the height and width of `like`, bilinear with aligned corners."""
    return F.interpolate(x, size=like.shape[2:], mode="bilinear", align_corners=True)
