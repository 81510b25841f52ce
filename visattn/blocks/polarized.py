"""Polarized self-attention: a channel gate from softmax pooling in space, a spatial gate from softmax over channels."""

from torch import Tensor, nn

from visattn.blocks.parts.check import hidden_width, require_choice, require_map
from visattn.blocks.parts.pool import global_mean, wide
from visattn.blocks.parts.products import contracted, scaled, scaled_by_sum
from visattn.core.tap import Tap


class PolarizedAttention(nn.Module):
    r"""Gate channels and positions, each keeping full resolution in its own axis.

    .. math::
        \alpha^{ch} = \sigma\bigl(\mathrm{LN}(W_z\, W_v X\, \mathrm{softmax}_{HW}(W_q X))\bigr), \qquad
        \alpha^{sp} = \sigma\bigl(\mathrm{softmax}_{C/2}(W'_q \bar{x})^\top W'_v X\bigr), \qquad
        y = \alpha^{ch} x + \alpha^{sp} x

    Args:
        channels: C, the width of the input; queries and values have C / 2 channels.
        mode: ``"parallel"`` adds the two gated maps, ``"sequential"`` gates by channel, then by
            position.
        form: ``"paper"``, or ``"code"``, the authors' release, see below.

    Shape:
        - Input: (B, C, H, W), any H and W from 1 up.
        - Output: as the input.

    Map:
        ``channel.tap``, kind channel: (B, C, 1, 1), and ``spatial.tap``, kind spatial: (B, 1, H,
        W), values in (0, 1), no sum.

    Raises:
        ValueError: ``channels`` is below 2, or ``mode`` or ``form`` is unknown.

    Reference:
        Liu, Liu, Fan, Huang 2021, "Polarized Self-Attention: Towards High-quality Pixel-wise
        Regression", https://arxiv.org/abs/2107.00782. Differs from the authors' code in:
        ``form="code"`` leaves the biases of queries and values out and, in parallel mode, drops LN
        and takes the spatial softmax over the positions of the result; in sequential mode, W_z is
        two layers of hidden width C / 8 with LN and ReLU between, and the spatial softmax is over
        the positions of the values.

    Example:
        >>> import torch
        >>> PolarizedAttention(12)(torch.rand(2, 12, 7, 11)).shape
        torch.Size([2, 12, 7, 11])
    """

    def __init__(self, channels: int, *, mode: str = "parallel", form: str = "paper"):
        super().__init__()
        require_choice("mode", mode, ("parallel", "sequential"))
        require_choice("form", form, ("paper", "code"))
        if channels < 2:
            raise ValueError(f"channels must be 2 or more; got {channels}")
        self.channels = channels
        self.parallel = mode == "parallel"
        self.channel = ChannelBranch(
            channels, _excitation(channels, mode, form), bias=form == "paper"
        )
        if form == "paper":
            self.spatial = SpatialBranch(channels, query_norm=nn.Softmax(1), bias=True)
        elif mode == "parallel":
            self.spatial = SpatialBranch(channels, score_norm=nn.Softmax(2), bias=False)
        else:
            self.spatial = SoftValueBranch(channels)

    def forward(self, x: Tensor) -> Tensor:
        require_map(x, self.channels)
        if self.parallel:
            return scaled_by_sum(x, self.channel(x), self.spatial(x))
        x = scaled(x, self.channel(x))
        return scaled(x, self.spatial(x))


def _excitation(channels: int, mode: str, form: str) -> nn.Module:
    """The layers between the pooled values (B, C / 2) and the channel gate's argument (B, C)."""
    half = channels // 2
    if form == "paper":
        return nn.Sequential(nn.Linear(half, channels), nn.LayerNorm(channels))
    if mode == "parallel":
        return nn.Linear(half, channels, bias=False)
    hidden = hidden_width(half, 4)
    return nn.Sequential(
        nn.Linear(half, hidden), nn.LayerNorm(hidden), nn.ReLU(), nn.Linear(hidden, channels)
    )


class ChannelBranch(nn.Module):
    """The channel gate: positions are pooled by a learned softmax over all of them, then the channels are excited."""

    def __init__(self, channels: int, excite: nn.Module, *, bias: bool):
        super().__init__()
        # A bias of the query would move all scores alike, which softmax ignores.
        self.query = nn.Conv2d(channels, 1, 1, bias=False)
        self.value = nn.Linear(channels, channels // 2, bias=bias)
        self.excite = excite
        self.tap = Tap("channel")

    def forward(self, x: Tensor) -> Tensor:
        query = self.query.weight.view(1, -1).expand(x.size(0), -1)
        weights = contracted(x.flatten(2), query, 1).softmax(-1, dtype=wide(x))
        # The weights sum to one, so to pool first and project one vector is the same as to project
        # every position.
        pooled = contracted(x.flatten(2), weights.to(x.dtype), 2)
        return self.tap(self.excite(self.value(pooled)).sigmoid()[:, :, None, None])


class SpatialBranch(nn.Module):
    """The spatial gate: one query per image, from the global averages, scores the values of all positions."""

    def __init__(
        self,
        channels: int,
        *,
        query_norm: nn.Module | None = None,
        score_norm: nn.Module | None = None,
        bias: bool,
    ):
        super().__init__()
        self.query = nn.Linear(channels, channels // 2, bias=bias)
        self.value = nn.Conv2d(channels, channels // 2, 1, bias=bias)
        self.query_norm = query_norm or nn.Identity()
        self.score_norm = score_norm or nn.Identity()
        self.tap = Tap("spatial")

    def forward(self, x: Tensor) -> Tensor:
        query = self.query_norm(self.query(global_mean(x)))
        # q (W x) = (q W) x: one vector per image instead of a projection of every position.
        direction = (query @ self.value.weight.flatten(1)).to(x.dtype)
        score = contracted(x.flatten(2), direction, 1).unsqueeze(1)
        if self.value.bias is not None:
            score = score + (query @ self.value.bias)[:, None, None]
        score = self.score_norm(score)
        return self.tap(score.sigmoid().view(x.size(0), 1, x.size(2), x.size(3)))


class SoftValueBranch(nn.Module):
    """The spatial gate of the authors' sequential code: each channel of the values is a softmax over the positions."""

    def __init__(self, channels: int):
        super().__init__()
        self.query = nn.Linear(channels, channels // 2, bias=False)
        self.value = nn.Conv2d(channels, channels // 2, 1, bias=False)
        self.tap = Tap("spatial")

    def forward(self, x: Tensor) -> Tensor:
        value = self.value(x).flatten(2).softmax(-1)
        score = self.query(global_mean(x)).unsqueeze(1) @ value
        return self.tap(score.sigmoid().view(x.size(0), 1, x.size(2), x.size(3)))
