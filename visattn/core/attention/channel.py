"""Attention between channels instead of tokens."""

from torch import Tensor, nn

from visattn.core.attention.heads import merge_heads, split_projections, width_per_head
from visattn.core.formula import Attend
from visattn.core.layout import Channels
from visattn.core.normalize.definition import Normalizer
from visattn.core.similarity.definition import Similarity
from visattn.core.similarity.product import Cosine


class ChannelAttention(nn.Module):
    r"""The channels of a head attend each other, each described by its values at all tokens: cross-covariance.

    .. math::
        y^\top = f_{norm}(f_{sim}(q^\top, k^\top))\, v^\top, \qquad [q, k, v] = x W_{qkv}

    Args:
        dim: Width of a token.
        num_heads: H; must divide ``dim``.
        similarity: f_sim between channels, vectors of N numbers; None is Cosine, whose learned
            factor is the paper's 1 / tau. One with weights of its own, such as Bilinear, ties the
            module to one N, its ``head_dim``.
        normalize: f_norm; None is Softmax.
        qkv_bias: Add a bias to queries, keys and values.
        dropout: Share of the weights dropped in training.

    Shape:
        - x: (B, N, dim); mask: bool (B, N); tokens where it is False count as zero. ``grid`` has no
          effect.
        - Output: (B, N, dim).

    Map:
        (B, H, D, D) between the D channels of a head; rows sum to one where the normalizer says so.

    Raises:
        ValueError: ``num_heads`` does not divide ``dim``.

    Reference:
        El-Nouby et al. 2021, "XCiT: Cross-Covariance Image Transformers", section 3.2,
        https://arxiv.org/abs/2106.09681; Zamir et al. 2022, Restormer, eq. 1,
        https://arxiv.org/abs/2111.09881. Differs
        from: the factor is that of Cosine, positive, 10 at first; the authors' is a free number
            that starts at one.

    Example:
        >>> import torch
        >>> ChannelAttention(12, 3)(torch.rand(2, 35, 12)).shape
        torch.Size([2, 35, 12])
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        *,
        similarity: Similarity | None = None,
        normalize: Normalizer | None = None,
        qkv_bias: bool = True,
        dropout: float = 0.0,
    ):
        super().__init__()
        head_dim = width_per_head(dim, num_heads)
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        similarity = Cosine(head_dim, num_heads) if similarity is None else similarity
        self.attend = Attend(similarity, normalize, dropout=dropout)
        self.proj = nn.Linear(dim, dim)

    def forward(
        self, x: Tensor, *, grid: tuple[int, int] | None = None, mask: Tensor | None = None
    ) -> Tensor:
        qkv = self.qkv(x)
        if mask is not None:
            qkv = qkv.masked_fill(~mask[..., None], 0.0)
        layout = Channels()
        # (B, H, N, D) -> (B, H, D, N): channels take the place of tokens
        q, k, v = (layout.fold(y) for y in split_projections(qkv, 3, self.num_heads))
        m = layout.unfold(self.attend(q, k, v, layout=layout))
        return self.proj(merge_heads(m))
