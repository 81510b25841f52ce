"""Dual attention: positions attend positions, channels attend channels."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visattn.blocks.parts.check import hidden_width, require_map, require_positive
from visattn.blocks.parts.products import plain, product
from visattn.blocks.parts.tokens import (
    CACHED_SCORES,
    like_format,
    project_tokens,
    to_channels,
    to_map,
)
from visattn.core.formula import Attend
from visattn.core.layout import Channels
from visattn.core.normalize.exponential import Softmax
from visattn.core.similarity.product import Dot


class PositionAttention(nn.Module):
    r"""Add to each position what it attends at all others, by a weight that starts at zero.

    .. math::
        y_i = x_i + \gamma \sum_j \mathrm{softmax}_j(q_i^\top k_j)\, v_j, \qquad
        q = W_q x, \; k = W_k x, \; v = W_v x

    Args:
        channels: C, the width of the values.
        reduction: r, so queries and keys have ``max(1, C // r)`` channels.

    Shape:
        - Input and output: (B, C, H, W).

    Map:
        ``attend``, kind token: (B, 1, N, N); rows sum to one.

    Raises:
        ValueError: A size is below 1.

    Reference:
        Fu et al. 2019, "Dual Attention Network for Scene Segmentation",
        https://arxiv.org/abs/1809.02983.
        Differs from the authors' code in: a large N x N matrix is never formed.

    Example:
        >>> x = torch.rand(2, 12, 7, 11)
        >>> torch.equal(PositionAttention(12)(x), x)
        True
    """

    def __init__(self, channels: int, *, reduction: int = 8):
        super().__init__()
        self.channels = channels
        inner = hidden_width(channels, reduction)
        self.query = nn.Conv2d(channels, inner, 1)
        self.key = nn.Conv2d(channels, inner, 1)
        self.value = nn.Conv2d(channels, channels, 1)
        self.attend = Attend(Dot(inner), Softmax(), dense_below=CACHED_SCORES)
        self.gamma = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        require_map(x, self.channels)
        q, k, v = project_tokens(x, self.query, self.key, self.value)
        m = to_map(self.attend(q, k, v), x)
        gamma = self.gamma.to(x.dtype)
        return torch.addcmul(x, gamma, m.to(x.dtype))


class FlushedSoftmax(Softmax):
    r"""Softmax whose smallest weights are zero.

    .. math::
        \alpha_{ij} = p_{ij}\,[p_{ij} \ge 10^{-30}], \qquad p = \mathrm{softmax}(e)

    Args:
        num_heads: H.

    Shape:
        As Softmax.

    Map:
        The output; rows sum to one within the precision of float32.

    Raises:
        ValueError: ``num_heads`` is below 1.

    Reference:
        None. Differs from the softmax in: no denormal numbers (below 1e-38), which a CPU
        multiplies many times slower than normal ones.

    Example:
        >>> FlushedSoftmax()(torch.tensor([[[[0.0, -80.0]]]]))
        tensor([[[[1., 0.]]]])
    """

    def weights(self, e: Tensor, count: int | Tensor) -> Tensor:
        alpha = super().weights(e, count)
        return F.threshold(alpha, 1e-30, 0.0)


class Likeness(Dot):
    r"""The inner product of long vectors.

    .. math::
        e_{ij} = q_i \cdot k_j

    Args:
        As ``visattn.core.similarity.product.Dot``.

    Shape:
        As Dot.

    Map:
        None.

    Raises:
        As Dot.

    Reference:
        As Dot, https://arxiv.org/abs/1508.04025. Differs from it in: the gradient of the keys lies
        in memory as they do, not transposed, which matters where a key is a whole channel.

    Example:
        >>> Likeness(3)(torch.ones(1, 1, 2, 3), torch.ones(1, 1, 5, 3))[0, 0, 0]
        tensor([3., 3., 3., 3., 3.])
    """

    def forward(self, q: Tensor, k: Tensor) -> Tensor:
        if plain(q, k):
            return super().forward(q, k)
        return product(q, k.mT)


class ChannelAttentionModule(nn.Module):
    r"""Add to each channel what it attends at all others, by a weight that starts at zero.

    .. math::
        y_c = x_c + \gamma \sum_d \mathrm{softmax}_d(x_c^\top x_d)\, x_d

    Args:
        channels: C.
        inverted: Weigh by softmax(max - x_c x_d): a channel attends the least similar ones.

    Shape:
        - Input and output: (B, C, H, W).

    Map:
        ``attend``, kind channel: (B, 1, C, C), channels by channels; rows sum to one.

    Raises:
        ValueError: ``channels`` is below 1.

    Reference:
        Fu et al. 2019, "Dual Attention Network for Scene Segmentation",
        https://arxiv.org/abs/1809.02983. Differs from the authors' code in: theirs is
        ``inverted=True``. Weights below 1e-30 count as zero in both.

    Example:
        >>> x = torch.rand(2, 12, 7, 11)
        >>> torch.equal(ChannelAttentionModule(12)(x), x)
        True
    """

    def __init__(self, channels: int, *, inverted: bool = False):
        super().__init__()
        require_positive(channels=channels)
        self.channels = channels
        self.inverted = inverted
        # The C x C matrix is small compared to the map.
        self.attend = Attend(Likeness(1), FlushedSoftmax(), impl="dense")
        self.gamma = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        require_map(x, self.channels)
        layout = Channels()
        v = to_channels(x)  # (B, 1, C, N)
        # The authors subtract the scores from their row maximum; a softmax ignores the maximum.
        q = -v if self.inverted else v
        m = self.attend(q, v, v, layout=layout)
        m = to_map(layout.unfold(m), x)
        gamma = self.gamma.to(x.dtype)
        return torch.addcmul(x, gamma, m.to(x.dtype))


class DualAttention(nn.Module):
    r"""The sum of position attention and channel attention.

    .. math::
        y = \mathrm{PAM}(x) + \mathrm{CAM}(x)

    Args:
        channels: C.
        reduction: r of the position attention.
        inverted: As in the channel attention.

    Shape:
        - Input and output: (B, C, H, W).

    Map:
        ``position.attend``, kind token: (B, 1, N, N), and ``channel.attend``, kind channel: (B, 1,
        C, C), channels by channels; rows sum to one.

    Raises:
        ValueError: A size is below 1.

    Reference:
        Fu et al. 2019, "Dual Attention Network for Scene Segmentation",
        https://arxiv.org/abs/1809.02983.
        Differs from the paper in: the convolutions of the segmentation head before and after each
        branch are left out.

    Example:
        >>> DualAttention(12)(torch.rand(2, 12, 7, 11)).shape
        torch.Size([2, 12, 7, 11])
    """

    def __init__(
        self,
        channels: int,
        *,
        reduction: int = 8,
        inverted: bool = False,
    ):
        super().__init__()
        self.channels = channels
        self.position = PositionAttention(channels, reduction=reduction)
        self.channel = ChannelAttentionModule(channels, inverted=inverted)

    def forward(self, x: Tensor) -> Tensor:
        return like_format(self.position(x) + self.channel(x), x)
