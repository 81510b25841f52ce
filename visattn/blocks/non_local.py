"""Non-local block: every position attends every other, in the four forms of the paper."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visattn.blocks.parts.check import hidden_width, require_choice, require_map
from visattn.blocks.parts.map_attend import MapAttend
from visattn.blocks.parts.norm import make_norm
from visattn.blocks.parts.tokens import project_back, project_tokens, to_tokens
from visattn.core.normalize import NORMALIZERS
from visattn.core.similarity import SIMILARITIES

# f and its normalization C(x), by the names of the paper.
MODES = {
    "gaussian": ("dot", "softmax"),
    "embedded_gaussian": ("dot", "softmax"),
    "dot_product": ("dot", "none"),
    "concatenation": ("concat", "none"),
}


class NonLocal(nn.Module):
    r"""Add to each position what it attends at all others.

    .. math::
        y_i = x_i + \mathrm{BN}\Bigl(W_z \frac{1}{\mathcal{C}(x)} \sum_j f(x_i, x_j)\, g(x_j)\Bigr)

    f is :math:`e^{x_i^\top x_j}` (gaussian) or :math:`e^{\theta_i^\top \phi_j}` (embedded_gaussian), normalized to sum
    to one; or :math:`\theta_i^\top \phi_j` (dot_product) or :math:`\mathrm{ReLU}(w_f^\top [\theta_i, \phi_j])`
    (concatenation), divided by the number of positions.

    Args:
        channels: C.
        reduction: r, so theta, phi and g have ``max(1, C // r)`` channels.
        mode: The form of f.
        subsample: Halve keys and values by max pooling, 2 x 2.
        scale: Factor of the scores.
        norm: After W_z; it starts at zero. With ``"none"`` W_z starts at zero.

    Shape:
        - Input and output: (B, C, H, W).

    Map:
        ``attend``, kind token: (B, 1, N, N), or N / 4 keys; rows sum to one in the two gaussian
        modes.

    Raises:
        ValueError: A size is below 1, or a word is unknown.

    Reference:
        Wang, Girshick, Gupta, He 2018, "Non-local Neural Networks",
        https://arxiv.org/abs/1711.07971.
        Differs from: nothing but that an odd last row or column is pooled on its own. mmcv scales
        embedded_gaussian by (C / r)^-0.5 and has no norm, timm scales by C^-0.5: ``scale=``.

    Example:
        >>> x = torch.rand(2, 12, 7, 11)
        >>> torch.equal(NonLocal(12)(x), x)
        True
    """

    def __init__(
        self,
        channels: int,
        *,
        reduction: int = 2,
        mode: str = "embedded_gaussian",
        subsample: bool = False,
        scale: float = 1.0,
        norm: str = "batch",
    ):
        super().__init__()
        require_choice("mode", mode, MODES)
        inner = hidden_width(channels, reduction)
        self.channels, self.subsample, self.scale = channels, subsample, scale
        embeds = mode != "gaussian"
        self.query = nn.Conv2d(channels, inner, 1) if embeds else nn.Identity()
        self.key = nn.Conv2d(channels, inner, 1) if embeds else nn.Identity()
        self.value = nn.Conv2d(channels, inner, 1)
        similarity, normalize = MODES[mode]
        self.attend = MapAttend(
            SIMILARITIES[similarity](inner if embeds else channels), NORMALIZERS[normalize]()
        )
        self.proj = nn.Conv2d(inner, channels, 1)
        self.norm = make_norm(norm, channels)
        last = self.proj if norm == "none" else self.norm
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)

    def forward(self, x: Tensor) -> Tensor:
        require_map(x, self.channels)
        query, key, value = self._tokens(x)
        query = query if self.scale == 1 else query * self.scale
        m = self.attend(query, key.to(query.dtype), value.to(query.dtype))
        return x + self.norm(project_back(m, self.proj, x)).to(x.dtype)

    def _tokens(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if not self.subsample and isinstance(self.query, nn.Conv2d):
            return project_tokens(x, self.query, self.key, self.value)
        query, key, value = self.query(x), self.key(x), self.value(x)
        if self.subsample:
            key, value = halve(key), halve(value)
        return to_tokens(query), to_tokens(key), to_tokens(value)


def halve(x: Tensor) -> Tensor:
    """Max pooling, 2 x 2; an odd last row or column is pooled on its own. Unlike torch's, deterministic on CUDA."""
    x = F.pad(x, (0, x.shape[3] % 2, 0, x.shape[2] % 2), value=-torch.inf)
    x = torch.maximum(x[:, :, ::2], x[:, :, 1::2])
    return torch.maximum(x[..., ::2], x[..., 1::2])
