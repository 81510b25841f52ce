"""Double attention of A2-Nets: gather global descriptors, then distribute them."""

from torch import Tensor, nn

from visattn.blocks.parts.check import hidden_width, require_map, require_positive
from visattn.blocks.parts.products import product
from visattn.blocks.parts.tokens import like_format, map_size, project
from visattn.core.tap import Tap


class DoubleAttention(nn.Module):
    r"""Gather the map into n global descriptors and distribute them to the positions.

    .. math::
        y = W_o\, G\, \mathrm{softmax}_n(V), \qquad G = A\, \mathrm{softmax}_{hw}(B)^\top,
        \qquad A = W_A x, \; B = W_B x, \; V = W_V x

    Args:
        channels: C.
        reduction: r, so descriptors are C // r wide.
        num_descriptors: n; None is C // r as well.

    Shape:
        - Input and output: (B, C, H, W).

    Map:
        ``tap_gather``, kind spatial: (B, n, H, W), each of the n sums to one over the positions.
        ``tap_distribute``, kind spatial: (B, n, H, W), sums to one over the n at each position.

    Raises:
        ValueError: A size is below 1.

    Reference:
        Chen et al. 2018, "A^2-Nets: Double Attention Networks", https://arxiv.org/abs/1810.11579.
        Differs from: nothing; ports are known that normalize over the images of the batch.

    Example:
        >>> DoubleAttention(12)(torch.rand(2, 12, 7, 11)).shape
        torch.Size([2, 12, 7, 11])
    """

    def __init__(
        self,
        channels: int,
        *,
        reduction: int = 4,
        num_descriptors: int | None = None,
    ):
        super().__init__()
        self.channels = channels
        width = hidden_width(channels, reduction)
        if num_descriptors is None:
            num_descriptors = width
        require_positive(num_descriptors=num_descriptors)
        self.value = nn.Conv2d(channels, width, 1)
        self.gather = nn.Conv2d(channels, num_descriptors, 1)
        self.distribute = nn.Conv2d(channels, num_descriptors, 1)
        self.proj = nn.Conv2d(width, channels, 1)
        self.tap_gather = Tap("spatial")
        self.tap_distribute = Tap("spatial")

    def forward(self, x: Tensor) -> Tensor:
        require_map(x, self.channels)
        size = map_size(x)
        # (B, width, N), (B, n, N), (B, n, N)
        value, gather, distribute = project(x, self.value, self.gather, self.distribute)
        # Each position distributes over the n descriptors; each descriptor gathers over positions.
        distribute = self.tap_distribute(distribute.softmax(1).unflatten(2, size))
        gather = self.tap_gather(gather.softmax(2).unflatten(2, size))
        # Project the few descriptors, not the map: the same product in another order.
        descriptors = product(value, gather.flatten(2).mT)  # (B, width, n)
        descriptors = self.proj.weight.flatten(1) @ descriptors  # (B, C, n)
        y = product(descriptors, distribute.flatten(2))  # (B, C, N)
        if self.proj.bias is not None:
            y = y.add(self.proj.bias[:, None])
        y = y.unflatten(2, size)
        return like_format(y.to(x.dtype), x)
