"""SimAM: a gate per value, from how far it lies from the rest of its channel; no parameters."""

import torch
from torch import Tensor, nn

from visattn.blocks.parts.check import require_map, require_positive
from visattn.blocks.parts.moments import centered
from visattn.core.tap import Tap


class _EnergyGate(torch.autograd.Function):
    """The gate with its own gradient: saves the input and the gate and recomputes all else."""

    @staticmethod
    def forward(x: Tensor, regularizer: float) -> Tensor:
        deviation, scale = _energy(x, regularizer)
        deviation = deviation.mul_(scale.sqrt())
        return deviation.mul_(deviation).add_(0.5).sigmoid_().to(x.dtype)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        x, regularizer = inputs
        ctx.save_for_backward(x, output)
        ctx.regularizer = regularizer

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        x, gate = ctx.saved_tensors
        if torch.is_grad_enabled():  # a second derivative is wanted
            differentiable_gate = _gate(x, ctx.regularizer)
            (x_gradient,) = torch.autograd.grad(differentiable_gate, x, gradient, create_graph=True)
            return x_gradient, None
        # With s the scale (B, C, 1, 1), c the deviation (B, C, H, W) and n = HW - 1, the sigmoid's
        # argument is a = s c^2 + 1/2, and ds = -(8 s^2 / n) sum(c dc).
        deviation, scale = _energy(x, ctx.regularizer)
        score_gradient = torch.ops.aten.sigmoid_backward(gradient, gate)
        # da c, for the direct term 2 s c da
        direct = score_gradient.to(deviation.dtype).mul_(deviation)
        # c times this is the term through the variance
        through_variance = (direct * deviation).sum((2, 3), keepdim=True)
        through_variance = through_variance * scale.square() * (-8 / _degrees(x))
        # the term through the mean, the same at all positions
        through_mean = direct.mean((2, 3), keepdim=True) * scale * -2
        x_gradient = deviation.mul_(through_variance).add_(through_mean)  # in place: saves memory
        return x_gradient.add_(direct.mul_(2 * scale)).to(x.dtype), None


def _degrees(x: Tensor) -> int:
    """HW - 1, and 1 for a single position."""
    return torch.sym_max(x.size(2) * x.size(3) - 1, 1)


def _energy(x: Tensor, regularizer: float) -> tuple[Tensor, Tensor]:
    """The deviation of `x` from its channel mean, and the factor of its square."""
    deviation, _, norm = centered(x, (2, 3))
    variance = norm.square() / _degrees(x)  # (B, C, 1, 1)
    return deviation, 0.25 / (variance + regularizer)


def _gate(x: Tensor, regularizer: float) -> Tensor:
    """The gate from operations that torch can differentiate as often as needed."""
    deviation, scale = _energy(x, regularizer)
    return (deviation.square() * scale + 0.5).sigmoid().to(x.dtype)


class SimAM(nn.Module):
    r"""Gate each value by its inverse energy: values that stand out from their channel pass more.

    .. math::
        y = x\;\sigma\Bigl(\frac{(x - \mu)^2}{4\,(\sigma^2 + \lambda)} + \frac{1}{2}\Bigr),
        \qquad \sigma^2 = \frac{1}{HW - 1}\sum_{ij} (x_{ij} - \mu)^2 \quad\text{per channel}

    Args:
        channels: C, the width of the input.
        regularizer: λ, keeps the energy finite where a channel is constant.

    Shape:
        - Input: (B, C, H, W), any H and W from 1 up; on 1 x 1, where the variance has no meaning,
          it counts as zero.
        - Output: as the input.

    Map:
        ``tap``, kind spatial: (B, C, H, W), values in (0.62, 1), no sum.

    Raises:
        ValueError: ``channels`` is below 1 or ``regularizer`` is not positive.

    Reference:
        Yang, Zhang, Li, Xie 2021, "SimAM: A Simple, Parameter-Free Attention Module for
        Convolutional Neural Networks", https://proceedings.mlr.press/v139/yang21o.html.
        Differs from the authors' code in: 1 x 1 maps are defined (there 0 / 0). The closed form
        of the paper divides by HW, the authors' code by HW - 1: so here.

    Example:
        >>> import torch
        >>> SimAM(12)(torch.rand(2, 12, 7, 11)).shape
        torch.Size([2, 12, 7, 11])
    """

    def __init__(self, channels: int, *, regularizer: float = 1e-4):
        super().__init__()
        require_positive(channels=channels)
        if regularizer <= 0:
            raise ValueError(f"regularizer must be positive; got {regularizer}")
        self.channels = channels
        self.regularizer = regularizer
        self.tap = Tap("spatial")

    def forward(self, x: Tensor) -> Tensor:
        require_map(x, self.channels)
        gate = _gate if torch.compiler.is_compiling() else _EnergyGate.apply
        return x * self.tap(gate(x, self.regularizer))
