"""External attention: positions attend a memory that all images share."""

import torch
from torch import Tensor, nn

from visattn.blocks.parts.check import require_map, require_positive
from visattn.blocks.parts.norm import make_norm
from visattn.blocks.parts.tokens import to_map, to_tokens
from visattn.core.formula import Attend
from visattn.core.normalize.doubly import Double
from visattn.core.similarity.product import Dot


class ExternalAttention(nn.Module):
    r"""Replace keys and values by two learned memories of S slots, with a double normalization.

    .. math::
        y = \mathrm{ReLU}\bigl(x + \mathrm{BN}(W_o\, (\alpha M_v))\bigr), \qquad
        \alpha_{ns} = \frac{p_{ns}}{\sum_s p_{ns}}, \qquad
        p = \mathrm{softmax}_n\bigl((W_i x)\, M_k^\top\bigr)

    Args:
        channels: C.
        memory: S, the number of slots.
        norm: After W_o.

    Shape:
        - Input and output: (B, C, H, W).

    Map:
        ``attend``, kind token: (B, 1, N, S); rows sum to one.

    Raises:
        ValueError: A size is below 1.

    Reference:
        Guo et al. 2021, "Beyond Self-attention: External Attention using Two Linear Layers for
        Visual Tasks", https://arxiv.org/abs/2105.02358. Differs from the authors' code in: no 1e-9
        beside the sum over slots; the paper has no equation for the convolutions, the norm and the
        ReLU around, which are the code's.

    Example:
        >>> ExternalAttention(12).eval()(torch.rand(2, 12, 7, 11)).shape
        torch.Size([2, 12, 7, 11])
    """

    def __init__(
        self,
        channels: int,
        *,
        memory: int = 64,
        norm: str = "batch",
    ):
        super().__init__()
        require_positive(channels=channels, memory=memory)
        self.channels = channels
        self.query = nn.Conv2d(channels, channels, 1)
        # The authors draw one memory and start the other as its copy.
        keys = torch.randn(memory, channels) * (2 / memory) ** 0.5
        self.memory_key = nn.Parameter(keys)
        self.memory_value = nn.Parameter(keys.clone())
        self.attend = Attend(Dot(channels), Double())
        self.proj = nn.Conv2d(channels, channels, 1, bias=False)
        self.norm = make_norm(norm, channels)
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        require_map(x, self.channels)
        q = to_tokens(self.query(x))
        # (S, C) -> (B, 1, S, C), without a copy
        size = (x.shape[0], 1, -1, -1)
        k = self.memory_key.to(q.dtype).expand(size)
        v = self.memory_value.to(q.dtype).expand(size)
        m = to_map(self.attend(q, k, v), x)
        y = self.norm(self.proj(m))
        return self.act(x + y.to(x.dtype))
