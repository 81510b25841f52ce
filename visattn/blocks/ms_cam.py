"""MS-CAM, and AFF and iAFF, which fuse two maps by it."""

import torch
from torch import Tensor, nn

from visattn.blocks.parts.check import hidden_width, require_map
from visattn.blocks.parts.norm import make_norm
from visattn.blocks.parts.pool import axis_mean
from visattn.core.tap import Tap


def _bottleneck(channels: int, reduction: int, norm: str) -> nn.Sequential:
    """Two 1 x 1 convolutions with their norms; the norms make biases of the convolutions idle."""
    hidden = hidden_width(channels, reduction)
    return nn.Sequential(
        nn.Conv2d(channels, hidden, 1, bias=False),
        make_norm(norm, hidden),
        nn.ReLU(),
        nn.Conv2d(hidden, channels, 1, bias=False),
        make_norm(norm, channels),
    )


class MSCAM(nn.Module):
    r"""Gate each value by its own channels at its position and by those of the global average.

    .. math::
        y = x\,\sigma(L(x) + G(\bar{x})), \qquad L, G = \mathrm{BN}\,W_2\,\mathrm{ReLU}\,\mathrm{BN}\,W_1

    Args:
        channels: C, the width of the input.
        reduction: r, so the hidden width is ``max(1, C // r)``.
        norm: ``"batch"``, ``"layer"`` or ``"none"``.

    Shape:
        - Input: (B, C, H, W), any H and W from 1 up.
        - Output: as the input.

    Map:
        ``tap``, kind spatial: (B, C, H, W), values in (0, 1), no sum.

    Raises:
        ValueError: ``channels`` or ``reduction`` is below 1; or, with batch norm, a single image in
            training.

    Reference:
        Dai, Gieseke, Oehmcke, Wu, Barnard 2021, "Attentional Feature Fusion",
        https://arxiv.org/abs/2009.14082. Differs from the authors' code in: convolutions have no
        bias (one before batch norm changes nothing).

    Example:
        >>> import torch
        >>> MSCAM(12)(torch.rand(2, 12, 7, 11)).shape
        torch.Size([2, 12, 7, 11])
    """

    def __init__(self, channels: int, *, reduction: int = 4, norm: str = "batch"):
        super().__init__()
        self.channels = channels
        self.local_gate = _bottleneck(channels, reduction, norm)
        self.global_gate = _bottleneck(channels, reduction, norm)
        self.tap = Tap("spatial")

    def forward(self, x: Tensor) -> Tensor:
        require_map(x, self.channels)
        gate = (self.local_gate(x) + self.global_gate(axis_mean(x, (2, 3)))).sigmoid()
        return x * self.tap(gate)


class AFF(nn.Module):
    r"""Fuse two maps, position by position and channel by channel, by the gate of MS-CAM on their sum.

    .. math::
        z = \alpha\, x + (1 - \alpha)\, y, \qquad \alpha = \sigma(L(x + y) + G(\overline{x + y}))

    Args:
        channels: C, the width of both inputs.
        reduction: r, so the hidden width is ``max(1, C // r)``.
        factor: What the result is multiplied by.
        norm: ``"batch"``, ``"layer"`` or ``"none"``.

    Shape:
        - Inputs: x and y, both (B, C, H, W), any H and W from 1 up.
        - Output: as the inputs.

    Map:
        ``tap``, kind spatial: (B, C, H, W), the share of x, values in (0, 1); with the share of y
        it sums to one.

    Raises:
        ValueError: ``channels`` or ``reduction`` is below 1; or, with batch norm, a single image in
            training.

    Reference:
        Dai, Gieseke, Oehmcke, Wu, Barnard 2021, "Attentional Feature Fusion",
        https://arxiv.org/abs/2009.14082. Differs from the authors' code in: there the result is
        doubled (``factor=2``); convolutions have no bias (one before batch norm changes nothing).

    Example:
        >>> import torch
        >>> AFF(12)(torch.rand(2, 12, 7, 11), torch.rand(2, 12, 7, 11)).shape
        torch.Size([2, 12, 7, 11])
    """

    def __init__(
        self, channels: int, *, reduction: int = 4, factor: float = 1.0, norm: str = "batch"
    ):
        super().__init__()
        self.channels = channels
        self.factor = factor
        self.local_gate = _bottleneck(channels, reduction, norm)
        self.global_gate = _bottleneck(channels, reduction, norm)
        self.tap = Tap("spatial")

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        require_map(x, self.channels, name="x")
        require_map(y, self.channels, name="y")
        both = x + y
        gate = (self.local_gate(both) + self.global_gate(axis_mean(both, (2, 3)))).sigmoid()
        fused = _mixed(x, y, self.tap(gate))
        return fused if self.factor == 1 else fused * self.factor


class IAFF(nn.Module):
    r"""Fuse two maps as AFF does, with the sum inside the gate replaced by a first fusion.

    .. math::
        z = \alpha_2\, x + (1 - \alpha_2)\, y, \qquad \alpha_2 = M_2(\alpha_1\, x + (1 - \alpha_1)\, y),
        \qquad \alpha_1 = M_1(x + y), \qquad M_i(u) = \sigma(L_i(u) + G_i(\bar{u}))

    Args:
        channels: C, the width of both inputs.
        reduction: r, so the hidden width is ``max(1, C // r)``.
        shared_global: Whether the second gate uses the global branch of the first.
        norm: ``"batch"``, ``"layer"`` or ``"none"``.

    Shape:
        - Inputs: x and y, both (B, C, H, W), any H and W from 1 up.
        - Output: as the inputs.

    Map:
        ``tap_first`` and ``tap_second``, kind spatial: (B, C, H, W), the share of x in the first
        and in the last fusion, values in (0, 1); with the share of y they sum to one.

    Raises:
        ValueError: ``channels`` or ``reduction`` is below 1; or, with batch norm, a single image in
            training.

    Reference:
        Dai, Gieseke, Oehmcke, Wu, Barnard 2021, "Attentional Feature Fusion",
        https://arxiv.org/abs/2009.14082. Differs from the authors' code in: there the second global
        branch is built but the first is used again (``shared_global=True``); convolutions have no
        bias (one before batch norm changes nothing).

    Example:
        >>> import torch
        >>> IAFF(12)(torch.rand(2, 12, 7, 11), torch.rand(2, 12, 7, 11)).shape
        torch.Size([2, 12, 7, 11])
    """

    def __init__(
        self, channels: int, *, reduction: int = 4, shared_global: bool = False, norm: str = "batch"
    ):
        super().__init__()
        self.channels = channels
        self.local_gate1 = _bottleneck(channels, reduction, norm)
        self.global_gate1 = _bottleneck(channels, reduction, norm)
        self.local_gate2 = _bottleneck(channels, reduction, norm)
        self.global_gate2 = None if shared_global else _bottleneck(channels, reduction, norm)
        self.tap_first = Tap("spatial")
        self.tap_second = Tap("spatial")

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        require_map(x, self.channels, name="x")
        require_map(y, self.channels, name="y")
        both = x + y
        gate = (self.local_gate1(both) + self.global_gate1(axis_mean(both, (2, 3)))).sigmoid()
        both = _mixed(x, y, self.tap_first(gate))
        global_gate = self.global_gate1 if self.global_gate2 is None else self.global_gate2
        gate = (self.local_gate2(both) + global_gate(axis_mean(both, (2, 3)))).sigmoid()
        return _mixed(x, y, self.tap_second(gate))


def _mixed(x: Tensor, y: Tensor, share: Tensor) -> Tensor:
    """share * x + (1 - share) * y, in one pass."""
    return torch.lerp(y, x, share.to(x.dtype))
