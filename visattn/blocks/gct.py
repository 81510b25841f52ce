"""Gated channel transformation: channels compete or cooperate by their norms."""

import torch
from torch import Tensor, nn

from visattn.blocks.parts.check import require_choice, require_map, require_positive
from visattn.blocks.parts.pool import wide
from visattn.blocks.parts.products import scaled
from visattn.core.tap import Tap


class GatedChannelTransform(nn.Module):
    r"""Rescale each channel by a gate around one, from its norm relative to those of the others.

    .. math::
        y_c = \bigl(1 + \tanh(\gamma_c \hat{s}_c + \beta_c)\bigr)\, x_c, \qquad
        \hat{s}_c = \frac{\sqrt{C}\, s_c}{\lVert s \rVert_2}, \qquad s_c = \alpha_c \lVert x_c \rVert_2

    Args:
        channels: C, the width of the input.
        p: Which norm, 2 as above, or 1: the sum of magnitudes over their mean across the channels.
        eps: Added under both roots (to the mean, for ``p=1``).

    Shape:
        - Input: (B, C, H, W), any H and W from 1 up.
        - Output: as the input; the input itself at the start, where gamma and beta are zero.

    Map:
        ``tap``, kind channel: (B, C, 1, 1), each value in (0, 2); they do not sum to one.

    Raises:
        ValueError: ``channels`` is below 1, or ``p`` is neither 1 nor 2.

    Reference:
        Yang et al. 2020, "Gated Channel Transformation for Visual Recognition",
        https://arxiv.org/abs/1909.11519.
        Differs from: nothing.

    Example:
        >>> import torch
        >>> x = torch.rand(2, 12, 7, 11)
        >>> torch.equal(GatedChannelTransform(12)(x), x)
        True
    """

    def __init__(self, channels: int, *, p: int = 2, eps: float = 1e-5):
        super().__init__()
        require_positive(channels=channels)
        require_choice("p", p, (1, 2))
        self.channels, self.p, self.eps = channels, p, eps
        self.alpha = nn.Parameter(torch.ones(channels))
        self.gamma = nn.Parameter(torch.zeros(channels))
        self.beta = nn.Parameter(torch.zeros(channels))
        self.tap = Tap("channel")

    def forward(self, x: Tensor) -> Tensor:
        require_map(x, self.channels)
        norm = torch.linalg.vector_norm(x, self.p, dim=(2, 3), dtype=wide(x))
        if self.p == 2:
            s = self.alpha * (norm.square() + self.eps).sqrt()
            spread = (s.square().mean(1, keepdim=True) + self.eps).sqrt()
        else:
            s = self.alpha * norm
            spread = s.abs().mean(1, keepdim=True) + self.eps
        gate = 1 + torch.tanh(self.gamma * s / spread + self.beta)
        return scaled(x, self.tap(gate[:, :, None, None].to(x.dtype)))
