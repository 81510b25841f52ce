"""SCSA: strips of several extents gate the positions, then attention between the channels gates the channels."""

import torch
from torch import Tensor, nn

from visattn.blocks.parts.check import require_divisible, require_map, require_odd, require_positive
from visattn.blocks.parts.pool import axis_mean
from visattn.blocks.parts.products import scaled
from visattn.core.formula import Attend
from visattn.core.layout import Channels
from visattn.core.similarity.product import Dot
from visattn.core.tap import Tap


class SCSA(nn.Module):
    r"""Gate rows and columns at several extents, then channels by self-attention among them.

    .. math::
        x' = x\,\sigma(\mathrm{GN}_4(k * \bar{x}^h))\,\sigma(\mathrm{GN}_4(k * \bar{x}^w)), \qquad
        y = x'\,\sigma\bigl(\overline{\mathrm{softmax}(Q K^\top / \sqrt{C / h})\, V}\bigr)

    where k has a different extent in each quarter of the channels, Q, K and V scale the channels of
    the normalized windowed averages of x', their rows are channels, and the bar is the mean over
    the windows.

    Args:
        channels: C, the width of the input.
        num_heads: h, the groups of channels that attend to each other.
        window_size: Extent of the windows that are averaged before Q, K and V; rows and columns
            that fill no window are left out, but a map smaller than one window is one.
        kernel_sizes: Extents of k in the quarters of the channels, odd.

    Shape:
        - Input: (B, C, H, W), any H and W from 1 up. An export made from a map of one window stays
          with one window.
        - Output: as the input.

    Map:
        ``tap_h`` and ``tap_w``, kind spatial: (B, C, H, 1) and (B, C, 1, W), values in (0, 1), no
        sum; ``attend``, kind
        channel: (B, h, C / h, C / h), channels by channels, rows sum to one; ``tap_channel``, kind
            channel:
        (B, C, 1, 1), values in (0, 1), no sum.

    Raises:
        ValueError: ``channels`` is no multiple of ``num_heads`` or of the number of
            ``kernel_sizes``, or one of them is
        even.

    Reference:
        Si et al. 2024, "SCSA: Exploring the Synergistic Effects Between Spatial and Channel
        Attention", https://arxiv.org/abs/2407.05128. Differs from the authors' code in: maps
        smaller than a window are one window (there an error), and its other ways to pool and to
        gate are left out.

    Example:
        >>> import torch
        >>> SCSA(12, num_heads=3)(torch.rand(2, 12, 7, 11)).shape
        torch.Size([2, 12, 7, 11])
    """

    def __init__(
        self,
        channels: int,
        *,
        num_heads: int = 8,
        window_size: int = 7,
        kernel_sizes: tuple[int, ...] = (3, 5, 7, 9),
    ):
        super().__init__()
        require_positive(channels=channels, window_size=window_size)
        require_divisible(channels, num_heads, groups_name="num_heads")
        require_divisible(channels, len(kernel_sizes), groups_name="len(kernel_sizes)")
        require_odd(**{f"kernel_sizes[{i}]": size for i, size in enumerate(kernel_sizes)})
        self.channels = channels
        self.num_heads = num_heads
        self.window_size = window_size
        part = channels // len(kernel_sizes)
        self.convs = nn.ModuleList(
            nn.Conv1d(part, part, size, padding=size // 2, groups=part) for size in kernel_sizes
        )
        self.norm_h = nn.GroupNorm(len(kernel_sizes), channels)
        self.norm_w = nn.GroupNorm(len(kernel_sizes), channels)
        self.norm = nn.GroupNorm(1, channels)
        self.query = nn.Parameter(torch.ones(channels))
        self.key = nn.Parameter(torch.ones(channels))
        self.value = nn.Parameter(torch.ones(channels))
        self.attend = Attend(Dot(1))
        self.tap_h = Tap("spatial")
        self.tap_w = Tap("spatial")
        self.tap_channel = Tap("channel")

    def forward(self, x: Tensor) -> Tensor:
        require_map(x, self.channels)
        gate_h = self.tap_h(
            self.norm_h(self._strip(axis_mean(x, 3)[..., 0])).sigmoid().unsqueeze(3)
        )
        gate_w = self.tap_w(
            self.norm_w(self._strip(axis_mean(x, 2)[:, :, 0])).sigmoid().unsqueeze(2)
        )
        x = scaled(x, gate_h, gate_w)
        return scaled(x, self.tap_channel(self._channel_gate(x)))

    def _strip(self, strip: Tensor) -> Tensor:
        """Each part of the channels of (B, C, L) convolved with its own extent."""
        parts = strip.chunk(len(self.convs), 1)
        return torch.cat([conv(part) for conv, part in zip(self.convs, parts, strict=True)], 1)

    def _channel_gate(self, x: Tensor) -> Tensor:
        """The gate (B, C, 1, 1): channels are the tokens, windows their features."""
        rows = window_means(x.size(2), self.window_size, x)
        columns = window_means(x.size(3), self.window_size, x)
        tokens = self.norm(rows @ x @ columns.t()).flatten(2)
        heads, scale = (self.num_heads, -1), (self.channels // self.num_heads) ** -0.5
        query = (tokens * (self.query * scale)[:, None]).unflatten(1, heads)
        key = (tokens * self.key[:, None]).unflatten(1, heads)
        # The mean over the windows goes past the weights, which all windows share: one value per
        # token is enough.
        value = (tokens.mean(2) * self.value).unflatten(1, heads).unsqueeze(3)
        return (
            self.attend(query, key, value, layout=Channels()).flatten(1, 2).unsqueeze(3).sigmoid()
        )


def window_means(size: int, window: int, like: Tensor) -> Tensor:
    """The matrix (windows, size) that averages whole windows; a smaller axis is one window."""
    windows = torch.sym_max(size // window, 1)
    position = torch.arange(size, device=like.device)
    inside = position // window == torch.arange(windows, device=like.device)[:, None]
    return inside.to(like.dtype) / inside.sum(1, keepdim=True)
