"""ELA: a gate per row and a gate per column, each from a local convolution along its strip."""

from torch import Tensor, nn

from visattn.blocks.parts.check import require_divisible, require_map, require_odd, require_positive
from visattn.blocks.parts.pool import axis_mean
from visattn.blocks.parts.products import scaled
from visattn.core.tap import Tap


class ELA(nn.Module):
    r"""Gate rows and columns by convolutions along strips of averages, without narrowing the channels.

    .. math::
        y_{cij} = x_{cij}\; \sigma(\mathrm{GN}(F_h \bar{x}^h))_{ci}\; \sigma(\mathrm{GN}(F_w \bar{x}^w))_{cj},
        \qquad \bar{x}^h_{ci} = \tfrac{1}{W}\textstyle\sum_j x_{cij},
        \quad \bar{x}^w_{cj} = \tfrac{1}{H}\textstyle\sum_i x_{cij}

    Args:
        channels: C, the width of the input.
        kernel_size: Extent of F along the strip, odd.
        groups: Groups of the group norm.
        conv_groups: Groups of F; None is one per channel. The paper's ELA-T, B, S, L are
            (kernel_size, groups, conv_groups) = (5, 32, C), (7, 16, C), (5, 16, C / 8), (7, 16, C /
            8).
        silu: Whether a SiLU stands between norm and sigmoid.

    Shape:
        - Input: (B, C, H, W), any H and W from 1 up.
        - Output: as the input.

    Map:
        ``tap_h``, kind spatial: (B, C, H, 1), and ``tap_w``, kind spatial: (B, C, 1, W), values in
        (0, 1), no sum.

    Raises:
        ValueError: ``channels`` is no multiple of ``groups`` or ``conv_groups``, or ``kernel_size``
            is even.

    Reference:
        Xu, Wan 2024, "ELA: Efficient Local Attention for Deep Convolutional Neural Networks",
        https://arxiv.org/abs/2403.01123. Differs from timm in: no SiLU and several groups (timm:
        ``silu=True, groups=1``); from common ports in: F and its norm are not shared by rows and
        columns (the source ``"shared"`` of ``load_reference`` copies shared weights to both).

    Example:
        >>> import torch
        >>> ELA(12, groups=4)(torch.rand(2, 12, 7, 11)).shape
        torch.Size([2, 12, 7, 11])
    """

    def __init__(
        self,
        channels: int,
        *,
        kernel_size: int = 7,
        groups: int = 16,
        conv_groups: int | None = None,
        silu: bool = False,
    ):
        super().__init__()
        require_positive(channels=channels)
        require_odd(kernel_size=kernel_size)
        require_divisible(channels, groups)
        conv_groups = channels if conv_groups is None else conv_groups
        require_divisible(channels, conv_groups, groups_name="conv_groups")
        self.channels = channels
        k, pad = kernel_size, kernel_size // 2
        self.conv_h = nn.Conv2d(
            channels, channels, (k, 1), padding=(pad, 0), groups=conv_groups, bias=False
        )
        self.conv_w = nn.Conv2d(
            channels, channels, (1, k), padding=(0, pad), groups=conv_groups, bias=False
        )
        self.norm_h = nn.GroupNorm(groups, channels)
        self.norm_w = nn.GroupNorm(groups, channels)
        self.act = nn.SiLU() if silu else nn.Identity()
        self.tap_h = Tap("spatial")
        self.tap_w = Tap("spatial")

    def forward(self, x: Tensor) -> Tensor:
        require_map(x, self.channels)
        gate_h = self.act(self.norm_h(self.conv_h(axis_mean(x, 3)))).sigmoid()
        gate_w = self.act(self.norm_w(self.conv_w(axis_mean(x, 2)))).sigmoid()
        return scaled(x, self.tap_h(gate_h), self.tap_w(gate_w))
