"""Non-local block: every position attends every other, in the four forms of the paper."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visattn.blocks.parts.check import hidden_width, require_choice, require_map
from visattn.blocks.parts.norm import make_norm
from visattn.blocks.parts.tokens import CACHED_SCORES, project_back, project_tokens, to_tokens
from visattn.core.formula import Attend
from visattn.core.normalize import NORMALIZERS
from visattn.core.similarity import SIMILARITIES

# The similarity f and its normalizer C(x), by the paper's name of f.
MODES = {
    "gaussian": ("dot", "softmax"),
    "embedded_gaussian": ("dot", "softmax"),
    "dot_product": ("dot", "none"),
    "concatenation": ("concat", "none"),
}


class NonLocal(nn.Module):
    r"""Add to each position what it attends at all positions.

    .. math::
        y_i = x_i + \mathrm{BN}\Bigl(W_z \frac{1}{\mathcal{C}(x)} \sum_j f(x_i, x_j)\, g(x_j)\Bigr)

    f is :math:`e^{x_i^\top x_j}` (gaussian) or :math:`e^{\theta_i^\top \phi_j}`
    (embedded_gaussian), normalized to sum to one; or :math:`\theta_i^\top \phi_j` (dot_product)
    or :math:`\mathrm{ReLU}(w_f^\top [\theta_i, \phi_j])` (concatenation), divided by the number
    of positions.

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
        Differs from the paper in: an odd last row or column is pooled alone. mmcv scales
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
        self.channels = channels
        self.subsample = subsample
        self.scale = scale
        if mode == "gaussian":
            head_dim = channels
            self.query: nn.Module = nn.Identity()
            self.key: nn.Module = nn.Identity()
        else:
            head_dim = inner
            self.query = nn.Conv2d(channels, inner, 1)
            self.key = nn.Conv2d(channels, inner, 1)
        self.value = nn.Conv2d(channels, inner, 1)
        similarity, normalize = MODES[mode]
        self.attend = Attend(
            SIMILARITIES[similarity](head_dim),
            NORMALIZERS[normalize](),
            dense_below=CACHED_SCORES,
        )
        self.proj = nn.Conv2d(inner, channels, 1)
        self.norm = make_norm(norm, channels)
        # The last layer starts at zero, so that the block starts as the identity.
        last = self.proj if norm == "none" else self.norm
        for parameter in last.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        require_map(x, self.channels)
        q, k, v = self._project(x)
        if self.scale != 1:
            q = q * self.scale
        k = k.to(q.dtype)
        v = v.to(q.dtype)
        m = self.attend(q, k, v)
        y = self.norm(project_back(m, self.proj, x))
        return x + y.to(x.dtype)

    def _project(
        self,
        x: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and values as tokens, (B, 1, N, D) each."""
        if self.subsample:
            key = halve(self.key(x))
            value = halve(self.value(x))
            return to_tokens(self.query(x)), to_tokens(key), to_tokens(value)
        if isinstance(self.query, nn.Conv2d) and isinstance(self.key, nn.Conv2d):
            q, k, v = project_tokens(x, self.query, self.key, self.value)
            return q, k, v
        tokens = to_tokens(x)  # the gaussian form compares the map itself
        return tokens, tokens, to_tokens(self.value(x))


def halve(x: Tensor) -> Tensor:
    """Pool 2 x 2 by the maximum; an odd last row or column is pooled alone.

    Unlike torch's pooling it is deterministic on CUDA.
    """
    height, width = x.shape[2:]
    x = F.pad(x, (0, width % 2, 0, height % 2), value=-torch.inf)
    x = torch.maximum(x[:, :, ::2], x[:, :, 1::2])  # pairs of rows
    return torch.maximum(x[..., ::2], x[..., 1::2])  # pairs of columns
