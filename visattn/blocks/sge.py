"""SGE: each group of channels gates its positions by how much they resemble the group's average."""

import torch
from torch import Tensor, nn

from visattn.blocks.parts.check import require_divisible, require_map, require_positive
from visattn.blocks.parts.moments import centered, root
from visattn.blocks.parts.pool import global_mean
from visattn.blocks.parts.products import contracted, scaled
from visattn.core.tap import Tap


class SpatialGroupEnhance(nn.Module):
    r"""Gate positions, group by group, by their normalized similarity to the group's average vector.

    .. math::
        t_{gij} = \textstyle\sum_{c \in g} \bar{x}_c\, x_{cij}, \qquad
        y_{cij} = x_{cij}\,\sigma\Bigl(w_g \frac{t_{gij} - \mu_g}{\sigma_g + \epsilon} + b_g\Bigr), \quad c \in g

    with mean and (unbiased) standard deviation of t over the positions.

    Args:
        channels: C, the width of the input.
        groups: G, each with its own map.
        eps: ε, added to the standard deviation.

    Shape:
        - Input: (B, C, H, W), any H and W from 1 up; on 1 x 1 the standard deviation counts as
          zero.
        - Output: as the input.

    Map:
        ``tap``, kind spatial: (B, G, H, W), values in (0, 1), no sum.

    Raises:
        ValueError: ``channels`` is no multiple of ``groups``.

    Reference:
        Li, Hu, Yang 2019, "Spatial Group-wise Enhance: Improving Semantic Feature Learning in
        Convolutional Networks", https://arxiv.org/abs/1905.09646. Differs from the authors' code
        in: 1 x 1 maps are defined (there NaN).

    Example:
        >>> import torch
        >>> SpatialGroupEnhance(12, groups=4)(torch.rand(2, 12, 7, 11)).shape
        torch.Size([2, 12, 7, 11])
    """

    def __init__(self, channels: int, *, groups: int = 64, eps: float = 1e-5):
        super().__init__()
        require_positive(channels=channels)
        require_divisible(channels, groups)
        self.channels = channels
        self.groups = groups
        self.eps = eps
        self.weight = nn.Parameter(torch.zeros(groups, 1, 1))
        self.bias = nn.Parameter(torch.ones(groups, 1, 1))
        self.tap = Tap("spatial")

    def forward(self, x: Tensor) -> Tensor:
        require_map(x, self.channels)
        grouped = x.unflatten(1, (self.groups, -1))
        mean = global_mean(x).unflatten(1, (self.groups, -1)).flatten(0, 1)
        similarity = contracted(grouped.flatten(0, 1).flatten(2), mean, 1).view(
            x.size(0), -1, x.size(2), x.size(3)
        )
        similarity, _, norm = centered(similarity, (2, 3))
        deviation = norm / root(torch.sym_max(x.size(2) * x.size(3) - 1, 1), norm) + self.eps
        gate = (similarity * (self.weight / deviation)).add_(self.bias).sigmoid_()
        return scaled(grouped, self.tap(gate.to(x.dtype)).unsqueeze(2)).flatten(1, 2)
