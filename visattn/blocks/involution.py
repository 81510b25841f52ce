"""Involution: a kernel per position, shared by the channels of a group."""

from torch import Tensor, nn

from visattn.blocks.parts.check import hidden_width, require_divisible, require_map, require_odd
from visattn.blocks.parts.norm import make_norm
from visattn.blocks.parts.shifts import weighted_shifts
from visattn.blocks.parts.tokens import like_format
from visattn.core.tap import Tap


class Involution(nn.Module):
    r"""Weigh the neighbors of a position by a kernel that its own features generate.

    .. math::
        y_{pc} = \sum_{k} w_{p g(c) k}\, x_{p + k, c}, \qquad
        w_p = W_2\, \mathrm{ReLU}(\mathrm{BN}(W_1 x_p)) + b

    The block stands where a convolution stood.

    Args:
        channels: C.
        kernel_size: k, odd.
        group_channels: How many channels share a kernel.
        reduction: r, so the hidden width is ``max(1, C // r)``.
        norm: In place of batch norm.

    Shape:
        - Input and output: (B, C, H, W).

    Map:
        ``tap``, kind token: (B, C / group_channels, N, k^2), the weight of every neighbor, row by
        row around each of the N positions; any sign and sum.

    Raises:
        ValueError: C is no multiple of ``group_channels``, or the kernel is even.

    Reference:
        Li et al. 2021, "Involution: Inverting the Inherence of Convolution for Visual Recognition",
        https://arxiv.org/abs/2103.06255. Differs from the authors' code in: stride 1 only; the
        kernel is applied by shifted sums, without a copy of the input per neighbor.

    Example:
        >>> import torch
        >>> Involution(16).eval()(torch.rand(2, 16, 7, 11)).shape
        torch.Size([2, 16, 7, 11])
    """

    def __init__(
        self,
        channels: int,
        *,
        kernel_size: int = 7,
        group_channels: int = 16,
        reduction: int = 4,
        norm: str = "batch",
    ):
        super().__init__()
        require_odd(kernel_size=kernel_size)
        require_divisible(channels, group_channels, groups_name="group_channels")
        hidden = hidden_width(channels, reduction)
        self.channels = channels
        self.kernel_size = kernel_size
        self.groups = channels // group_channels
        self.reduce = nn.Conv2d(channels, hidden, 1, bias=False)
        self.norm = make_norm(norm, hidden)
        self.act = nn.ReLU()
        self.span = nn.Conv2d(hidden, self.groups * kernel_size**2, 1)
        self.tap = Tap("token")

    def forward(self, x: Tensor) -> Tensor:
        require_map(x, self.channels)
        hidden = self.act(self.norm(self.reduce(x)))
        weights = self.span(hidden)
        # (B, G k^2, H, W) -> (B, G, k^2, N); the map has the neighbors last
        weights = weights.flatten(2).unflatten(1, (self.groups, -1))
        weights = self.tap(weights.transpose(2, 3)).transpose(2, 3)
        # (B, G, k^2, N) -> (B, G, 1, k^2, H, W): the channels of a group share their kernel
        weights = weights.unflatten(3, x.shape[2:])[:, :, None]
        y = weighted_shifts(x, weights, self.kernel_size)
        return like_format(y.to(x.dtype), x)
