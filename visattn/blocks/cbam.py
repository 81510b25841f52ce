"""CBAM: a gate over channels, then a gate over positions."""

import torch
from torch import Tensor, nn

from visattn.blocks.parts.check import hidden_width, require_choice, require_map, require_odd
from visattn.blocks.parts.norm import make_norm
from visattn.blocks.parts.plane_conv import PlaneConv
from visattn.blocks.parts.pool import global_mean, max_and_mean, wide
from visattn.blocks.parts.products import scaled
from visattn.core.tap import Tap

POOLS = ("avg", "max", "lp", "lse")


class CBAM(nn.Module):
    r"""Rescale each channel by a gate from its average and maximum, then each position likewise.

    .. math::
        z = x \odot \sigma\bigl(M(\bar x) + M(\max_{ij} x)\bigr), \qquad M(v) = W_2\,\mathrm{ReLU}(W_1 v + b_1) + b_2,

        y = z \odot \sigma\bigl(\mathrm{BN}(w * [\max_c z;\; \bar z_c])\bigr)

    Args:
        channels: C, the width of the input.
        reduction: r, so the hidden width of M is ``max(1, C // r)``.
        kernel_size: Odd extent of the convolution w over positions.
        pools: The global pools that are summed: of ``"avg"``, ``"max"``, ``"lp"`` (square root of
            the sum of squares) and ``"lse"`` (logarithm of the sum of exponentials).
        bias: Whether M has biases.
        norm: After w: ``"batch"`` (as the authors' code), ``"layer"`` or ``"none"`` (as the paper's
            equation).
        spatial: Whether the second gate exists.

    Shape:
        - Input: (B, C, H, W), any H and W from 1 up.
        - Output: as the input.

    Map:
        ``tap_channel``, kind channel: (B, C, 1, 1), and ``tap_spatial``, kind spatial: (B, 1, H,
        W); each value in (0, 1); they do not sum to one.

    Raises:
        ValueError: ``channels`` or ``reduction`` is below 1, ``kernel_size`` is even, a pool or
            ``norm`` is unknown.

    Reference:
        Woo et al. 2018, "CBAM: Convolutional Block Attention Module",
        https://arxiv.org/abs/1807.06521.
        Differs from: the paper's equation has no batch norm in the second gate and stacks the
        average first; default here is the authors' code, to which their results belong.

    Example:
        >>> import torch
        >>> CBAM(12)(torch.rand(2, 12, 7, 11)).shape
        torch.Size([2, 12, 7, 11])
    """

    def __init__(
        self,
        channels: int,
        *,
        reduction: int = 16,
        kernel_size: int = 7,
        pools: tuple[str, ...] = ("avg", "max"),
        bias: bool = True,
        norm: str = "batch",
        spatial: bool = True,
    ):
        super().__init__()
        hidden = hidden_width(channels, reduction)
        require_odd(kernel_size=kernel_size)
        if not pools:
            raise ValueError(f"pools must name one of {', '.join(POOLS)} at least; got {pools}")
        for pool in pools:
            require_choice("pools", pool, POOLS)
        self.channels, self.pools, self.spatial = channels, tuple(pools), spatial
        self.fc1 = nn.Linear(channels, hidden, bias=bias)
        self.act = nn.ReLU()
        self.fc2 = nn.Linear(hidden, channels, bias=bias)
        self.gate = nn.Sigmoid()
        self.tap_channel = Tap("channel")
        if spatial:
            self.conv = PlaneConv(2, kernel_size)
            self.norm = make_norm(norm, 1, momentum=0.01)
            self.tap_spatial = Tap("spatial")

    def forward(self, x: Tensor) -> Tensor:
        require_map(x, self.channels)
        # One call for all pools: the rows of a batch do not see each other.
        hidden = self.act(self.fc1(global_pools(x, self.pools)))
        gate = self.gate(self.fc2(hidden).sum(0))
        x = scaled(x, self.tap_channel(gate[:, :, None, None]))
        if not self.spatial:
            return x
        pooled = torch.cat(max_and_mean(x, (1,))[0], 1)
        return scaled(x, self.tap_spatial(self.gate(self.norm(self.conv(pooled)))))


def global_pools(x: Tensor, pools: tuple[str, ...]) -> Tensor:
    """One number per channel and pool, (B, C, H, W) -> (pools, B, C)."""
    found = {}
    if "max" in pools:  # the mean costs no more beside it
        found["max"], found["avg"] = (pooled[:, :, 0, 0] for pooled in max_and_mean(x, (2, 3))[0])
    elif "avg" in pools:
        found["avg"] = global_mean(x)
    if "lp" in pools:
        found["lp"] = torch.linalg.vector_norm(x, dim=(2, 3))
    if "lse" in pools:
        found["lse"] = torch.logsumexp(x.to(wide(x)), (2, 3)).to(x.dtype)
    return torch.stack([found[pool] for pool in pools])
