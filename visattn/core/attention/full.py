"""Every token may attend every token: self- and cross-attention."""

from torch import Tensor, nn

from visattn.core.attention.heads import (
    key_mask,
    merge_heads,
    split_heads,
    split_projections,
    token_mask,
    width_per_head,
)
from visattn.core.formula import Attend
from visattn.core.normalize.definition import Normalizer
from visattn.core.position import Position, grid_coordinates
from visattn.core.similarity.definition import Similarity


class SelfAttention(nn.Module):
    r"""Every token attends every token.

    .. math::
        [q, k, v] = x W_{qkv}, \qquad y = f_{norm}(f_{sim}(q, k))\, v\, W_o

    Args:
        dim: Width of a token.
        num_heads: H; must divide ``dim``.
        similarity: f_sim; None is ScaledDot.
        normalize: f_norm; None is Softmax.
        position: A rotation or bias of ``visattn.core.position``, which then needs ``grid``; None
            for none.
        qkv_bias: Add a bias to queries, keys and values.
        qk_norm: Normalize queries and keys (LayerNorm per head).
        dropout: Share of the weights dropped in training.

    Shape:
        - x: (B, N, dim); grid: rows and columns of the last rows * columns tokens.
        - mask: bool, (B, N) for keys, or broadcastable to (B, H, N, N); True may attend.
        - Output: (B, N, dim).

    Map:
        (B, H, N, N); rows sum to one where the normalizer says so.

    Raises:
        ValueError: ``num_heads`` does not divide ``dim``; ``grid`` is missing where ``position``
            needs it.

    Reference:
        Vaswani et al. 2017, section 3.2, https://arxiv.org/abs/1706.03762. Differs from: parameter
        names, which are timm's.

    Example:
        >>> import torch
        >>> SelfAttention(12, 3)(torch.rand(2, 5, 12)).shape
        torch.Size([2, 5, 12])
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        *,
        similarity: Similarity | None = None,
        normalize: Normalizer | None = None,
        position: Position | None = None,
        qkv_bias: bool = True,
        qk_norm: bool = False,
        dropout: float = 0.0,
    ):
        super().__init__()
        head_dim = width_per_head(dim, num_heads)
        self.dim = dim
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.q_norm = nn.LayerNorm(head_dim, eps=1e-6) if qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(head_dim, eps=1e-6) if qk_norm else nn.Identity()
        self.position = position
        if position is not None:
            similarity = position.widen(similarity)
        self.attend = Attend(similarity, normalize, dropout=dropout)
        self.proj = nn.Linear(dim, dim)

    def forward(
        self, x: Tensor, *, grid: tuple[int, int] | None = None, mask: Tensor | None = None
    ) -> Tensor:
        q, k, v = split_projections(self.qkv(x), 3, self.num_heads)
        q = self.q_norm(q)
        k = self.k_norm(k)
        bias = None
        if self.position is not None:
            q, k, bias = self.position(q, k, grid_coordinates(grid, x.device))
        m = self.attend(q, k, v, bias=bias, mask=token_mask(mask, self.attend))
        return self.proj(merge_heads(m))


class CrossAttention(nn.Module):
    r"""Tokens attend the tokens of another set.

    .. math::
        q = x W_q, \quad [k, v] = c\, W_{kv}, \qquad y = f_{norm}(f_{sim}(q, k))\, v\, W_o

    Args:
        dim: Width of a token.
        num_heads: H; must divide ``dim``.
        similarity: f_sim; None is ScaledDot.
        normalize: f_norm; None is Softmax.
        context_dim: Width of a token of the context; None is ``dim``.
        dropout: Share of the weights dropped in training.

    Shape:
        - x: (B, N, dim); context: (B, M, context_dim), x itself where None.
        - mask: bool, (B, M) for keys, or broadcastable to (B, H, N, M); True may attend.
        - Output: (B, N, dim).

    Map:
        (B, H, N, M); rows sum to one where the normalizer says so.

    Raises:
        ValueError: ``num_heads`` does not divide ``dim``.

    Reference:
        Vaswani et al. 2017, section 3.2.3, https://arxiv.org/abs/1706.03762. Differs from: nothing.

    Example:
        >>> import torch
        >>> CrossAttention(12, 3)(torch.rand(2, 5, 12), torch.rand(2, 7, 12)).shape
        torch.Size([2, 5, 12])
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        *,
        similarity: Similarity | None = None,
        normalize: Normalizer | None = None,
        context_dim: int | None = None,
        dropout: float = 0.0,
    ):
        super().__init__()
        width_per_head(dim, num_heads)
        self.num_heads = num_heads
        self.q = nn.Linear(dim, dim)
        context_dim = dim if context_dim is None else context_dim
        self.kv = nn.Linear(context_dim, 2 * dim)
        self.attend = Attend(similarity, normalize, dropout=dropout)
        self.proj = nn.Linear(dim, dim)

    def forward(
        self, x: Tensor, context: Tensor | None = None, *, mask: Tensor | None = None
    ) -> Tensor:
        q = split_heads(self.q(x), self.num_heads)
        context = x if context is None else context
        k, v = split_projections(self.kv(context), 2, self.num_heads)
        m = self.attend(q, k, v, mask=key_mask(mask))
        return self.proj(merge_heads(m))
