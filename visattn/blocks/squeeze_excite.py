"""Squeeze-and-excitation: one gate per channel from the global averages."""

from torch import Tensor, nn

from visattn.blocks.parts.check import hidden_width, require_map
from visattn.blocks.parts.gate import make_gate
from visattn.blocks.parts.pool import global_mean
from visattn.blocks.parts.products import scaled
from visattn.core.tap import Tap


class SqueezeExcite(nn.Module):
    r"""Rescale each channel by a gate computed from the global averages of all channels.

    .. math::
        y_c = \sigma\bigl(W_2\,\mathrm{ReLU}(W_1 \bar{x} + b_1) + b_2\bigr)_c\; x_c,
        \qquad \bar{x}_c = \tfrac{1}{HW}\textstyle\sum_{ij} x_{cij}

    Args:
        channels: C, the width of the input.
        reduction: r, so the hidden width is ``max(1, C // r)``.
        bias: Whether the two layers have biases.
        gate: The last function, ``"sigmoid"`` or ``"hard_sigmoid"``.

    Shape:
        - Input: (B, C, H, W), any H and W from 1 up.
        - Output: as the input.

    Map:
        ``tap``, kind channel: (B, C, 1, 1), each value in (0, 1); they do not sum to one.

    Raises:
        ValueError: ``channels`` or ``reduction`` is below 1, or ``gate`` is unknown.

    Reference:
        Hu, Shen, Sun 2018, "Squeeze-and-Excitation Networks", https://arxiv.org/abs/1709.01507.
        Differs from: nothing. Most ports leave the biases of the authors' code out
        (``bias=False``).

    Example:
        >>> import torch
        >>> SqueezeExcite(12)(torch.rand(2, 12, 7, 11)).shape
        torch.Size([2, 12, 7, 11])
    """

    def __init__(
        self, channels: int, *, reduction: int = 16, bias: bool = True, gate: str = "sigmoid"
    ):
        super().__init__()
        self.channels = channels
        hidden = hidden_width(channels, reduction)
        self.fc1 = nn.Linear(channels, hidden, bias=bias)
        self.act = nn.ReLU()
        self.fc2 = nn.Linear(hidden, channels, bias=bias)
        self.gate = make_gate(gate)
        self.tap = Tap("channel")

    def forward(self, x: Tensor) -> Tensor:
        require_map(x, self.channels)
        gate = self.gate(self.fc2(self.act(self.fc1(global_mean(x)))))
        return scaled(x, self.tap(gate[:, :, None, None]))
