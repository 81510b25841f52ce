"""Frequency channel attention: squeeze-and-excitation on cosine coefficients, not averages."""

import math

import torch
from torch import Tensor, nn

from visattn.blocks.parts.check import hidden_width, require_divisible, require_map
from visattn.blocks.parts.pool import interval_means
from visattn.blocks.parts.products import scaled
from visattn.core.tap import Tap

# The 32 frequencies (along H, along W) of a 7 x 7 grid, best first, from the authors' code.
# Four pairs per line.
TOP_FREQUENCIES = (
    (0, 0), (0, 1), (6, 0), (0, 5),
    (0, 2), (1, 0), (1, 2), (4, 0),
    (5, 0), (1, 6), (3, 0), (0, 4),
    (0, 6), (0, 3), (3, 5), (2, 2),
    (4, 6), (6, 3), (3, 3), (5, 3),
    (5, 5), (2, 1), (6, 1), (5, 2),
    (5, 4), (3, 2), (3, 1), (4, 1),
    (2, 3), (2, 0), (6, 5), (1, 3),
)  # fmt: skip


class FrequencyChannelAttention(nn.Module):
    r"""Rescale each channel by a gate computed from one cosine coefficient of every channel.

    .. math::
        y_c = \sigma\bigl(W_2\,\mathrm{ReLU}(W_1 f)\bigr)_c\; x_c, \qquad
        f_c = \textstyle\sum_{ij} x_{cij}\, \phi_{u_c}(i)\, \phi_{v_c}(j), \qquad
        \phi_u(i) = \sqrt{\tfrac{2 - [u = 0]}{n}} \cos\frac{\pi u (i + \frac12)}{n}

    The channels are split into as many equal parts as there are frequencies (u, v). With frequency
    (0, 0) alone, f is the global average times n.

    Args:
        channels: C, the width of the input.
        reduction: r, so the hidden width is ``max(1, C // r)``.
        frequencies: How many of the authors' 32 best frequencies are used.
        size: n, the side of the grid on which the cosines live. Maps of another size are averaged
            to it.

    Shape:
        - Input: (B, C, H, W), any H and W from 1 up.
        - Output: as the input.

    Map:
        ``tap``, kind channel: (B, C, 1, 1), each value in (0, 1); they do not sum to one.

    Raises:
        ValueError: ``channels`` is not a multiple of ``frequencies``, ``frequencies`` is not in 1
            to 32, or ``size`` is below 7.

    Reference:
        Qin et al. 2021, "FcaNet: Frequency Channel Attention Networks",
        https://arxiv.org/abs/2012.11879. Differs from the authors' code in: the averaging to the
        grid is folded into the cosines, which gives the same numbers without adaptive pooling.

    Example:
        >>> import torch
        >>> FrequencyChannelAttention(32)(torch.rand(2, 32, 7, 11)).shape
        torch.Size([2, 32, 7, 11])
    """

    cosines_h: Tensor
    cosines_w: Tensor

    def __init__(self, channels: int, *, reduction: int = 16, frequencies: int = 16, size: int = 7):
        super().__init__()
        hidden = hidden_width(channels, reduction)
        if not 1 <= frequencies <= len(TOP_FREQUENCIES):
            raise ValueError(f"frequencies must be 1 to {len(TOP_FREQUENCIES)}; got {frequencies}")
        require_divisible(channels, frequencies, groups_name="frequencies")
        if size < 7:
            raise ValueError(
                f"size must be 7 or more, for the frequencies are those of a 7 x 7 grid; got {size}"
            )
        self.channels = channels
        self.size = size
        channels_per_frequency = channels // frequencies
        frequencies_h, frequencies_w = zip(*TOP_FREQUENCIES[:frequencies], strict=True)
        cosines_h = cosine_table(frequencies_h, size).repeat_interleave(channels_per_frequency, 0)
        cosines_w = cosine_table(frequencies_w, size).repeat_interleave(channels_per_frequency, 0)
        self.register_buffer("cosines_h", cosines_h, persistent=False)  # (C, n)
        self.register_buffer("cosines_w", cosines_w, persistent=False)  # (C, n)
        self.fc1 = nn.Linear(channels, hidden, bias=False)
        self.act = nn.ReLU()
        self.fc2 = nn.Linear(hidden, channels, bias=False)
        self.gate = nn.Sigmoid()
        self.tap = Tap("channel")

    def forward(self, x: Tensor) -> Tensor:
        require_map(x, self.channels)
        # Averaging to the grid is a matrix: (C, n) @ (n, H) -> (C, H), and likewise for W.
        rows = self.cosines_h @ interval_means(x.size(2), self.size, self.cosines_h)
        columns = self.cosines_w @ interval_means(x.size(3), self.size, self.cosines_w)
        # (B, C, H, W) * (C, H, W) -> (B, C)
        coefficients = (x * (rows[:, :, None] * columns[:, None, :])).sum((2, 3))
        gate = self.gate(self.fc2(self.act(self.fc1(coefficients))))
        return scaled(x, self.tap(gate[:, :, None, None]))


def cosine_table(frequencies: tuple[int, ...], size: int) -> Tensor:
    """One row per frequency of the 7 x 7 grid, at `size` points: (frequencies, size)."""
    # A frequency of the 7 x 7 grid is that many times higher on a larger one.
    multiple = size // 7
    return torch.tensor([cosine(frequency * multiple, size) for frequency in frequencies])


def cosine(frequency: int, size: int) -> list[float]:
    """The orthonormal cosine of that frequency at `size` points (type II)."""
    numerator = 1 if frequency == 0 else 2
    scale = math.sqrt(numerator / size)
    return [scale * math.cos(math.pi * frequency * (i + 0.5) / size) for i in range(size)]
