"""Other implementations of blocks to measure against: timm's layers, and each equation written down straightforwardly.

The straightforward forms do what most ports do: adaptive pools, `var`, permuted copies, N x N
matrices. They are here to be timed; their weights are random.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from timm import layers
from timm.layers import cbam, coord_attn
from torch import Tensor, nn


class Gates(nn.Module):
    """CBAM or BAM: a channel and a spatial branch."""

    def __init__(self, channels: int, *, style: str):
        super().__init__()
        self.style, hidden = style, channels // 16
        self.mlp = nn.Sequential(
            nn.Flatten(), nn.Linear(channels, hidden), nn.ReLU(), nn.Linear(hidden, channels)
        )
        if style == "cbam":
            self.spatial = nn.Sequential(
                nn.Conv2d(2, 1, 7, padding=3, bias=False), nn.BatchNorm2d(1)
            )
        else:
            dilated = [nn.Conv2d(hidden, hidden, 3, padding=4, dilation=4) for _ in range(2)]
            inner = [part for conv in dilated for part in (conv, nn.BatchNorm2d(hidden), nn.ReLU())]
            first = [nn.Conv2d(channels, hidden, 1), nn.BatchNorm2d(hidden), nn.ReLU()]
            self.spatial = nn.Sequential(*first, *inner, nn.Conv2d(hidden, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        gate = self.mlp(F.adaptive_avg_pool2d(x, 1))[:, :, None, None]
        if self.style == "bam":
            return x * (1 + torch.sigmoid(gate.expand_as(x) + self.spatial(x).expand_as(x)))
        x = x * torch.sigmoid(
            gate + self.mlp(F.adaptive_max_pool2d(x, 1))[:, :, None, None]
        ).expand_as(x)
        pooled = torch.cat((torch.max(x, 1)[0].unsqueeze(1), torch.mean(x, 1).unsqueeze(1)), dim=1)
        return x * torch.sigmoid(self.spatial(pooled))


class Coordinate(nn.Module):
    """Coordinate attention by adaptive pools."""

    def __init__(self, channels: int):
        super().__init__()
        width = max(8, channels // 32)
        self.shared = nn.Sequential(
            nn.Conv2d(channels, width, 1), nn.BatchNorm2d(width), nn.Hardswish()
        )
        self.rows, self.columns = nn.Conv2d(width, channels, 1), nn.Conv2d(width, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[2:]
        rows = F.adaptive_avg_pool2d(x, (None, 1))
        columns = F.adaptive_avg_pool2d(x, (1, None)).permute(0, 1, 3, 2)
        rows, columns = torch.split(
            self.shared(torch.cat([rows, columns], dim=2)), [height, width], dim=2
        )
        return x * self.columns(columns.permute(0, 1, 3, 2)).sigmoid() * self.rows(rows).sigmoid()


class SimAM(nn.Module):
    """SimAM step by step."""

    def forward(self, x: Tensor) -> Tensor:
        d = (x - x.mean(dim=[2, 3], keepdim=True)).pow(2)
        n = x.shape[2] * x.shape[3] - 1
        return x * torch.sigmoid(d / (4 * (d.sum(dim=[2, 3], keepdim=True) / n + 1e-4)) + 0.5)


class Triplet(nn.Module):
    """Triplet attention by turning the map around twice."""

    def __init__(self, channels: int):
        super().__init__()
        planes = (
            nn.Sequential(nn.Conv2d(2, 1, 7, padding=3, bias=False), nn.BatchNorm2d(1))
            for _ in range(3)
        )
        self.planes = nn.ModuleList(planes)

    def forward(self, x: Tensor) -> Tensor:
        total = 0
        for plane, turn in zip(
            self.planes, ((0, 2, 1, 3), (0, 3, 2, 1), (0, 1, 2, 3)), strict=True
        ):
            turned = x.permute(turn).contiguous()
            pooled = torch.cat(
                (torch.max(turned, 1)[0].unsqueeze(1), torch.mean(turned, 1).unsqueeze(1)), dim=1
            )
            total = total + (turned * torch.sigmoid(plane(pooled))).permute(turn).contiguous()
        return total / 3


class Double(nn.Module):
    """A2 with every map formed."""

    def __init__(self, channels: int):
        super().__init__()
        self.width = channels // 4
        self.parts = nn.ModuleList(nn.Conv2d(channels, self.width, 1) for _ in range(3))
        self.proj = nn.Conv2d(self.width, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        value, gather, spread = (part(x).flatten(2) for part in self.parts)
        descriptors = torch.bmm(value, F.softmax(gather, dim=-1).permute(0, 2, 1))
        return self.proj(
            descriptors.matmul(F.softmax(spread, dim=1)).view(len(x), self.width, *x.shape[2:])
        )


class Grouped(nn.Module):
    """SGE or shuffle attention with var and copies."""

    def __init__(self, channels: int, *, style: str):
        super().__init__()
        self.style, self.groups = style, min(64, channels // 2) if style == "shuffle" else 64
        width = channels // (2 * self.groups)
        shape = (1, width, 1, 1) if style == "shuffle" else (1, self.groups, 1, 1)
        self.weights = nn.ParameterList(torch.rand(shape) for _ in range(4))
        self.norm = nn.GroupNorm(width, width) if style == "shuffle" else None

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        first, second, third, fourth = self.weights
        if self.style == "sge":
            grouped = x.reshape(b * self.groups, -1, h, w)
            score = (
                (grouped * F.adaptive_avg_pool2d(grouped, 1))
                .sum(dim=1, keepdim=True)
                .view(b * self.groups, -1)
            )
            score = score - score.mean(dim=1, keepdim=True)
            score = (score / (score.std(dim=1, keepdim=True) + 1e-5)).view(
                b, self.groups, h, w
            ) * first + second
            return (grouped * torch.sigmoid(score.view(b * self.groups, 1, h, w))).view(b, c, h, w)
        left, right = x.reshape(b * self.groups, -1, h, w).chunk(2, dim=1)
        left = left * torch.sigmoid(first * F.adaptive_avg_pool2d(left, 1) + second)
        right = right * torch.sigmoid(third * self.norm(right) + fourth)
        both = torch.cat([left, right], dim=1).contiguous().view(b, 2, c // 2, h, w)
        return both.permute(0, 2, 1, 3, 4).reshape(b, c, h, w)


class Tokens(nn.Module):
    """PAM, CAM, or criss-cross attention with the matrices formed."""

    def __init__(self, channels: int, *, style: str):
        super().__init__()
        self.style, self.gamma = style, nn.Parameter(torch.zeros(1))
        if style != "cam":
            self.query, self.key = (nn.Conv2d(channels, channels // 8, 1) for _ in range(2))
            self.value = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        if self.style == "cam":
            flat = x.flatten(2)
            return (
                self.gamma * (F.softmax(flat @ flat.transpose(1, 2), dim=-1) @ flat).view(x.shape)
                + x
            )
        q, k, v = self.query(x), self.key(x), self.value(x)
        if self.style == "pam":
            alpha = F.softmax(q.flatten(2).permute(0, 2, 1) @ k.flatten(2), dim=-1)
            return self.gamma * (v.flatten(2) @ alpha.permute(0, 2, 1)).view(x.shape) + x
        return self.gamma * self._cross(q, k, v) + x

    def _cross(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        b, _, h, w = v.shape
        (qc, kc, vc), (qr, kr, vr) = (
            [
                y.permute(order).contiguous().view(-1, *(y.shape[i] for i in order[2:]))
                for y in (q, k, v)
            ]
            for order in ((0, 3, 1, 2), (0, 2, 1, 3))
        )
        down = (qc.transpose(1, 2) @ kc).masked_fill(
            torch.eye(h, dtype=torch.bool, device=v.device), -torch.inf
        )
        down = down.view(b, w, h, h).permute(0, 2, 1, 3)
        alpha = F.softmax(torch.cat([down, (qr.transpose(1, 2) @ kr).view(b, h, w, w)], 3), dim=3)
        down = alpha[..., :h].permute(0, 2, 1, 3).contiguous().view(b * w, h, h)
        across = alpha[..., h:].contiguous().view(b * h, w, w)
        columns = (vc @ down.transpose(1, 2)).view(b, w, -1, h).permute(0, 2, 3, 1)
        return columns + (vr @ across.transpose(1, 2)).view(b, h, -1, w).permute(0, 2, 1, 3)


class Polarized(nn.Module):
    """Parallel polarized attention, every step its own map."""

    def __init__(self, channels: int):
        super().__init__()
        half = channels // 2
        self.value, self.query = nn.Conv2d(channels, half, 1), nn.Conv2d(channels, 1, 1)
        self.up, self.norm = nn.Conv2d(half, channels, 1), nn.LayerNorm(channels)
        self.value2, self.query2 = nn.Conv2d(channels, half, 1), nn.Conv2d(channels, half, 1)

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        weights = F.softmax(self.query(x).reshape(b, -1, 1), dim=1)
        z = self.up(torch.matmul(self.value(x).reshape(b, c // 2, -1), weights).unsqueeze(-1))
        channel = (
            torch.sigmoid(self.norm(z.reshape(b, c, 1).permute(0, 2, 1)))
            .permute(0, 2, 1)
            .reshape(b, c, 1, 1)
            * x
        )
        pooled = F.adaptive_avg_pool2d(self.query2(x), 1).permute(0, 2, 3, 1).reshape(b, 1, c // 2)
        spatial = torch.matmul(F.softmax(pooled, dim=-1), self.value2(x).reshape(b, c // 2, -1))
        return channel + torch.sigmoid(spatial.reshape(b, 1, h, w)) * x


Build = Callable[[int], nn.Module]
PEERS: dict[str, dict[str, Build]] = {
    "se": {"timm": lambda c: layers.SEModule(c, rd_ratio=1 / 16, rd_divisor=1)},
    "ese": {"timm": lambda c: layers.EffectiveSEModule(c)},
    "eca": {"timm": lambda c: layers.EcaModule(c)},
    "cbam": {
        "timm": lambda c: cbam.CbamModule(c, rd_divisor=1),
        "plain": lambda c: Gates(c, style="cbam"),
    },
    "bam": {"plain": lambda c: Gates(c, style="bam")},
    "coord": {"timm": lambda c: coord_attn.CoordAttn(c), "plain": Coordinate},
    "gc": {
        "timm": lambda c: layers.GlobalContext(
            c, fuse_add=True, fuse_scale=False, rd_ratio=1 / 16, rd_divisor=1
        )
    },
    "simam": {"plain": lambda c: SimAM()},
    "triplet": {"plain": Triplet},
    "a2": {"plain": Double},
    "sge": {"plain": lambda c: Grouped(c, style="sge")},
    "shuffle": {"plain": lambda c: Grouped(c, style="shuffle")},
    "non_local": {"timm": lambda c: layers.NonLocalAttn(c, rd_ratio=1 / 2, rd_divisor=1)},
    "pam": {"plain": lambda c: Tokens(c, style="pam")},
    "cam": {"plain": lambda c: Tokens(c, style="cam")},
    "criss_cross": {"plain": lambda c: Tokens(c, style="criss_cross")},
    "polarized": {"plain": Polarized},
    "sk": {"timm": lambda c: layers.SelectiveKernel(c, split_input=False, groups=32)},
    "split": {"timm": lambda c: layers.SplitAttn(c, norm_layer=nn.BatchNorm2d)},
}
"""block: {label: builder of a peer for so many channels}."""

OURS: dict[str, Callable[[int], dict]] = {
    "criss_cross": lambda c: {"recurrence": 1},
    "shuffle": lambda c: {"groups": min(64, c // 2)},
}
"""Options under which ours does what the peer does, where the defaults differ, for each number of channels."""
