"""Gaussian context transformer: channels far from the average one are damped, without any weights."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from visattn.blocks.parts.check import require_map, require_positive
from visattn.blocks.parts.pool import global_mean, wide
from visattn.blocks.parts.products import scaled
from visattn.core.tap import Tap


class GaussianContextTransformer(nn.Module):
    r"""Rescale each channel by a Gaussian of how far its average lies from the average channel.

    .. math::
        y_c = \exp\Bigl(-\frac{\hat{z}_c^2}{2 c^2}\Bigr)\, x_c, \qquad
        \hat{z}_c = \frac{\bar{x}_c - \mu}{\sqrt{\sigma^2 + \epsilon}}

    mu and sigma are taken over the channels of one image.

    Args:
        channels: C, the width of the input.
        width: c, the standard deviation of the Gaussian.
        bounds: None keeps c fixed; (low, high) learns it between these, as
            :math:`c = low + (high - low)\,\sigma(\theta)`, from theta = 0; ``width`` is then not used.
        eps: Added to the variance.

    Shape:
        - Input: (B, C, H, W), any H and W from 1 up.
        - Output: as the input.

    Map:
        ``tap``, kind channel: (B, C, 1, 1), each value in (0, 1]; they do not sum to one.

    Raises:
        ValueError: ``channels`` is below 1, ``width`` is not positive, or ``bounds`` are not 0 <
            low < high.

    Reference:
        Ruan et al. 2021, "Gaussian Context Transformer", CVPR,
        https://openaccess.thecvf.com/content/CVPR2021/html/Ruan_Gaussian_Context_Transformer_CVPR_2021_paper.html.
        Differs from: the authors published no code. eps stands under the root, so that a gradient
        exists where all channels agree.

    Example:
        >>> import torch
        >>> GaussianContextTransformer(12)(torch.rand(2, 12, 7, 11)).shape
        torch.Size([2, 12, 7, 11])
    """

    def __init__(
        self,
        channels: int,
        *,
        width: float = 2.0,
        bounds: tuple[float, float] | None = None,
        eps: float = 1e-5,
    ):
        super().__init__()
        require_positive(channels=channels)
        if width <= 0:
            raise ValueError(f"width must be positive; got {width}")
        if bounds is not None and not 0 < bounds[0] < bounds[1]:
            raise ValueError(f"bounds must be (low, high) with 0 < low < high; got {bounds}")
        self.channels, self.width, self.bounds, self.eps = channels, width, bounds, eps
        self.theta = None if bounds is None else nn.Parameter(torch.zeros(()))
        self.tap = Tap("channel")

    def forward(self, x: Tensor) -> Tensor:
        require_map(x, self.channels)
        z = F.layer_norm(global_mean(x, dtype=wide(x)), (self.channels,), eps=self.eps)
        width = self.width
        if self.theta is not None:
            low, high = self.bounds
            width = low + (high - low) * torch.sigmoid(self.theta)
        gate = torch.exp(-0.5 * (z / width).square())
        return scaled(x, self.tap(gate[:, :, None, None].to(x.dtype)))
