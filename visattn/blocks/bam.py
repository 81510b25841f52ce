"""BAM: one gate for every value, the sum of a channel branch and a branch of dilated convolutions."""

import torch
from torch import Tensor, nn

from visattn.blocks.parts.check import hidden_width, require_choice, require_map, require_positive
from visattn.blocks.parts.norm import make_norm
from visattn.blocks.parts.pool import axis_mean
from visattn.blocks.parts.products import pieces, plain
from visattn.core.tap import Tap

COMBINE = ("add", "multiply")


class _Raised(torch.autograd.Function):
    """x + x gate in one pass, and its gradient in one more."""

    @staticmethod
    def forward(x: Tensor, gate: Tensor) -> Tensor:
        return torch.addcmul(x, x, gate)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, Tensor]:
        x, gate = ctx.saved_tensors
        return torch.addcmul(gradient, gradient, gate), (gradient * x).sum_to_size(gate.shape)


class _SumGate(torch.autograd.Function):
    """The sigmoid of the sum of one value per channel and one per position."""

    @staticmethod
    def forward(channel: Tensor, spatial: Tensor) -> Tensor:
        return (channel + spatial).sigmoid_()

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, Tensor]:
        (gate,) = ctx.saved_tensors
        if torch.is_grad_enabled():  # a second derivative is wanted
            gradient = gradient * gate * (1 - gate)
            return gradient.sum((2, 3), keepdim=True), gradient.sum(1, keepdim=True)
        channel, spatial = (
            gate.new_empty(*gate.shape[:2], 1, 1),
            gate.new_empty(gate.size(0), 1, *gate.shape[2:]),
        )
        for g, alpha, c, s in zip(
            *(t.split(pieces(gate)) for t in (gradient, gate, channel, spatial)), strict=True
        ):
            g = torch.ops.aten.sigmoid_backward(g, alpha)
            torch.sum(g, (2, 3), keepdim=True, out=c)
            torch.sum(g, 1, keepdim=True, out=s)
        return channel, spatial


def sum_gate(channel: Tensor, spatial: Tensor) -> Tensor:
    """sigmoid(channel + spatial) for (B, C, 1, 1) and (B, 1, H, W)."""
    return (
        (channel + spatial).sigmoid()
        if plain(channel, spatial)
        else _SumGate.apply(channel, spatial)
    )


def raised(x: Tensor, gate: Tensor) -> Tensor:
    """x (1 + gate)."""
    return x * (1 + gate) if plain(x, gate) else _Raised.apply(x, gate)


class BAM(nn.Module):
    r"""Raise each value by a gate from a channel branch and a spatial branch.

    .. math::
        y = x \odot \bigl(1 + \sigma(M_c(x) + M_s(x))\bigr)

    M_c is a bottleneck on the global averages, M_s a 1 x 1 convolution, dilated 3 x 3 convolutions
    and a 1 x 1 convolution to one channel; each layer but the last of a branch is followed by norm
    and ReLU.

    Args:
        channels: C, the width of the input.
        reduction: r, so the hidden width of both branches is ``max(1, C // r)``.
        dilation: Of the 3 x 3 convolutions.
        num_layers: How many of those there are.
        combine: ``"add"`` as the paper, ``"multiply"`` for the weights that the authors released.
        norm: ``"batch"``, ``"layer"`` or ``"none"``.

    Shape:
        - Input: (B, C, H, W), any H and W from 1 up.
        - Output: as the input.

    Map:
        ``tap``, kind spatial: (B, C, H, W), each value in (0, 1); they do not sum to one.

    Raises:
        ValueError: A size is below 1, ``combine`` or ``norm`` is unknown; in training on one image
            with batch norm.

    Reference:
        Park et al. 2018, "BAM: Bottleneck Attention Module", https://arxiv.org/abs/1807.06514.
        Differs from: the authors' code multiplies the branches (``combine="multiply"``). The norms
        stand where the code has them; the paper's equations have one at the end of each branch.

    Example:
        >>> import torch
        >>> BAM(12)(torch.rand(2, 12, 7, 11)).shape
        torch.Size([2, 12, 7, 11])
    """

    def __init__(
        self,
        channels: int,
        *,
        reduction: int = 16,
        dilation: int = 4,
        num_layers: int = 2,
        combine: str = "add",
        norm: str = "batch",
    ):
        super().__init__()
        hidden = hidden_width(channels, reduction)
        require_positive(dilation=dilation, num_layers=num_layers)
        require_choice("combine", combine, COMBINE)
        self.channels, self.combine = channels, combine
        self.channel = nn.Sequential(
            nn.Conv2d(channels, hidden, 1),
            make_norm(norm, hidden),
            nn.ReLU(),
            nn.Conv2d(hidden, channels, 1),
        )
        layers = [nn.Conv2d(channels, hidden, 1), make_norm(norm, hidden), nn.ReLU()]
        for _ in range(num_layers):
            conv = nn.Conv2d(hidden, hidden, 3, padding=dilation, dilation=dilation)
            layers += [conv, make_norm(norm, hidden), nn.ReLU()]
        self.spatial = nn.Sequential(*layers, nn.Conv2d(hidden, 1, 1))
        self.tap = Tap("spatial")

    def forward(self, x: Tensor) -> Tensor:
        require_map(x, self.channels)
        channel = self.channel(axis_mean(x, (2, 3)))
        spatial = self.spatial(x)
        gate = (
            sum_gate(channel, spatial) if self.combine == "add" else (channel * spatial).sigmoid()
        )
        return raised(x, self.tap(gate).to(x.dtype))
