"""Contextual transformer block: local kernels computed from keys and queries."""

import torch
from torch import Tensor, nn

from visattn.blocks.parts.check import require_divisible, require_map, require_odd
from visattn.blocks.parts.norm import make_norm
from visattn.blocks.parts.pool import global_mean
from visattn.blocks.parts.shifts import weighted_shifts
from visattn.blocks.parts.tokens import like_format
from visattn.core.tap import Tap


class ContextualTransformer(nn.Module):
    r"""Weigh the neighbors by a kernel made of the key's context; fuse the sum with that context.

    .. math::
        K = \mathrm{ReLU}(\mathrm{BN}(W_K * x)), \qquad
        w = \mathrm{GN}\bigl(W_2\,\mathrm{ReLU}(\mathrm{BN}(W_1 [x, K]))\bigr), \qquad
        D_p = \sum_k w_{pk}\,(\mathrm{BN}(W_V x))_{p + k}

    .. math::
        y = a_1 \odot \mathrm{SiLU}(\mathrm{BN}(D)) + a_2 \odot K, \qquad
        a = \mathrm{softmax}(\text{squeeze of the sum})

    The weights w are not normalized over the neighborhood. The block stands where a 3 x 3
    convolution stood.

    Args:
        channels: C, a multiple of ``share`` and of 4.
        kernel_size: k, odd.
        share: How many channels share a kernel.
        norm: In place of batch norm.

    Shape:
        - Input and output: (B, C, H, W).

    Map:
        ``tap``, kind token: (B, C / share, N, k^2), the weight of every neighbor, row by row around
        each of the N positions; any sign and sum. ``tap_branch``, kind branch: (B, 2, C, 1, 1),
        local and static; sums to one.

    Raises:
        ValueError: C is no multiple of ``share`` or 4, the kernel is even, or batch norm trains on
            one image.

    Reference:
        Li, Yao, Pan, Mei 2021, "Contextual Transformer Networks for Visual Recognition", section 3,
        https://arxiv.org/abs/2107.12292. Differs from the paper in: details that only the authors'
        code has (groups of 4, group norm of the kernels, squeeze-and-select fusion), all as there;
        the kernel is applied by shifted sums.

    Example:
        >>> ContextualTransformer(16).eval()(torch.rand(2, 16, 7, 11)).shape
        torch.Size([2, 16, 7, 11])
    """

    def __init__(
        self,
        channels: int,
        *,
        kernel_size: int = 3,
        share: int = 8,
        norm: str = "batch",
    ):
        super().__init__()
        require_odd(kernel_size=kernel_size)
        require_divisible(channels, share, groups_name="share")
        require_divisible(channels, 4, groups_name="the 4 groups of the key")
        self.channels = channels
        self.kernel_size = kernel_size
        self.num_kernels = channels // share
        num_weights = self.num_kernels * kernel_size**2
        hidden = max(channels // 2, 32)
        padding = kernel_size // 2
        self.key = nn.Sequential(
            nn.Conv2d(channels, channels, kernel_size, padding=padding, groups=4, bias=False),
            make_norm(norm, channels),
            nn.ReLU(),
        )
        self.embed = nn.Sequential(
            nn.Conv2d(2 * channels, channels // 2, 1, bias=False),
            make_norm(norm, channels // 2),
            nn.ReLU(),
            nn.Conv2d(channels // 2, num_weights, 1),
            nn.GroupNorm(self.num_kernels, num_weights),
        )
        self.value = nn.Sequential(
            nn.Conv2d(channels, channels, 1, bias=False), make_norm(norm, channels)
        )
        self.norm = make_norm(norm, channels)
        self.act = nn.SiLU()
        self.fuse = nn.Sequential(
            nn.Conv2d(channels, hidden, 1),
            make_norm(norm, hidden),
            nn.ReLU(),
            nn.Conv2d(hidden, 2 * channels, 1),
        )
        self.tap = Tap("token")
        self.tap_branch = Tap("branch")

    def forward(self, x: Tensor) -> Tensor:
        require_map(x, self.channels)
        static = self.key(x)
        weights = self._weigh_neighbors(x, static)
        local = weighted_shifts(self.value(x), weights[:, None], self.kernel_size)
        local = self.act(self.norm(local))
        shares = self._weigh_branches(local, static)
        # shares[:, 0] * local + shares[:, 1] * static, with one map less in memory
        y = shares[:, 0] * local
        y = torch.addcmul(y, shares[:, 1], static)
        return like_format(y.to(x.dtype), x)

    def _weigh_neighbors(self, x: Tensor, static: Tensor) -> Tensor:
        """Return the kernel of every position, (B, kernels, k^2, H, W)."""
        weights = self.embed(torch.cat([x, static], 1))
        # (B, kernels k^2, H, W) -> (B, kernels, k^2, N); the map has the neighbors last
        weights = weights.flatten(2).unflatten(1, (self.num_kernels, -1))
        weights = self.tap(weights.transpose(2, 3)).transpose(2, 3)
        return weights.unflatten(3, x.shape[2:])

    def _weigh_branches(self, local: Tensor, static: Tensor) -> Tensor:
        """Return the shares of the local and the static branch, (B, 2, C, 1, 1)."""
        summary = global_mean(local) + global_mean(static)  # (B, C)
        logits = self.fuse(summary[:, :, None, None])
        # The authors' logits alternate between the branches: (B, 2 C, 1, 1) -> (B, C, 2, 1, 1)
        shares = logits.unflatten(1, (-1, 2)).softmax(2)
        return self.tap_branch(shares.transpose(1, 2))
