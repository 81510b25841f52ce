"""Attention where one side is one token or is learned: class token, learned queries, external memory."""

import torch
from torch import Tensor, nn

from visattn.core.attention.heads import (
    key_mask,
    merge_heads,
    split_heads,
    split_projections,
    width_per_head,
)
from visattn.core.formula import Attend
from visattn.core.normalize.definition import Normalizer
from visattn.core.normalize.doubly import Double
from visattn.core.similarity.definition import Similarity
from visattn.core.similarity.product import Dot


class ClassAttention(nn.Module):
    r"""The class token, which leads the sequence, attends all tokens; the others only serve as keys and values.

    .. math::
        y_0 = f_{norm}(f_{sim}(x_0 W_q,\, x W_k))\, x W_v\, W_o

    Args:
        dim: Width of a token.
        num_heads: H; must divide ``dim``.
        similarity: f_sim; None is ScaledDot.
        normalize: f_norm; None is Softmax.
        qkv_bias: Add a bias to queries, keys and values.
        dropout: Share of the weights dropped in training.

    Shape:
        - x: (B, 1 + N, dim), the class token first; mask: bool (B, 1 + N) over keys. ``grid`` has
          no effect.
        - Output: (B, 1, dim), the class token alone.

    Map:
        (B, H, 1, 1 + N); the row sums to one where the normalizer says so.

    Raises:
        ValueError: ``num_heads`` does not divide ``dim``.

    Reference:
        Touvron et al. 2021, "Going Deeper with Image Transformers", section 3,
        https://arxiv.org/abs/2103.17239.
        Differs from: nothing.

    Example:
        >>> ClassAttention(12, 3)(torch.rand(2, 1 + 35, 12)).shape
        torch.Size([2, 1, 12])
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
        width_per_head(dim, num_heads)
        self.num_heads = num_heads
        self.q = nn.Linear(dim, dim, bias=qkv_bias)
        self.k = nn.Linear(dim, dim, bias=qkv_bias)
        self.v = nn.Linear(dim, dim, bias=qkv_bias)
        self.attend = Attend(similarity, normalize, dropout=dropout)
        self.proj = nn.Linear(dim, dim)

    def forward(
        self, x: Tensor, *, grid: tuple[int, int] | None = None, mask: Tensor | None = None
    ) -> Tensor:
        q = split_heads(self.q(x[:, :1]), self.num_heads)
        k = split_heads(self.k(x), self.num_heads)
        v = split_heads(self.v(x), self.num_heads)
        m = self.attend(q, k, v, mask=key_mask(mask))
        return self.proj(merge_heads(m))


class PoolAttention(nn.Module):
    r"""A few learned queries attend the tokens, and an MLP follows: pooling by attention.

    .. math::
        z = f_{norm}(f_{sim}(s W_q,\, x W_k))\, x W_v\, W_o, \qquad y = z + \mathrm{MLP}(\mathrm{LN}(z))

    Args:
        dim: Width of a token.
        num_heads: H; must divide ``dim``.
        similarity: f_sim; None is ScaledDot.
        normalize: f_norm; None is Softmax.
        num_queries: How many queries s are learned.
        mlp_ratio: The MLP's hidden width over ``dim``; 0 leaves LN and MLP out.
        qkv_bias: Add a bias to queries, keys and values.

    Shape:
        - x: (B, N, dim); context: (B, M, dim), tokens pooled together with x, None for none.
        - mask: bool (B, N + M) over keys, or broadcastable to (B, H, num_queries, N + M); True may
          attend.
        - Output: (B, num_queries, dim).

    Map:
        (B, H, num_queries, N + M); rows sum to one where the normalizer says so.

    Raises:
        ValueError: ``num_heads`` does not divide ``dim``; ``num_queries`` is below 1.

    Reference:
        Lee et al. 2019, "Set Transformer", section 3.2 (PMA), https://arxiv.org/abs/1810.00825; in
        the form of the MAP head of Zhai et al. 2022, "Scaling Vision Transformers",
        https://arxiv.org/abs/2106.04560. Differs from: parameter names, which are timm's.

    Example:
        >>> PoolAttention(12, 3, num_queries=2)(torch.rand(2, 35, 12)).shape
        torch.Size([2, 2, 12])
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        *,
        similarity: Similarity | None = None,
        normalize: Normalizer | None = None,
        num_queries: int = 1,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
    ):
        super().__init__()
        width_per_head(dim, num_heads)
        if num_queries < 1:
            raise ValueError(f"num_queries must be at least 1; got {num_queries}")
        self.num_heads = num_heads
        latent = torch.empty(1, num_queries, dim)
        self.latent = nn.Parameter(nn.init.trunc_normal_(latent, std=dim**-0.5))
        self.q = nn.Linear(dim, dim, bias=qkv_bias)
        self.kv = nn.Linear(dim, 2 * dim, bias=qkv_bias)
        self.attend = Attend(similarity, normalize)
        self.proj = nn.Linear(dim, dim)
        self.norm: nn.Module | None = None
        self.mlp: nn.Module | None = None
        if mlp_ratio:
            self.norm = nn.LayerNorm(dim, eps=1e-6)
            self.mlp = _mlp(dim, int(dim * mlp_ratio))

    def forward(
        self, x: Tensor, context: Tensor | None = None, *, mask: Tensor | None = None
    ) -> Tensor:
        if context is not None:
            x = torch.cat([x, context], dim=1)
        queries = self.q(self.latent).expand(x.shape[0], -1, -1)
        q = split_heads(queries, self.num_heads)
        k, v = split_projections(self.kv(x), 2, self.num_heads)
        z = self.proj(merge_heads(self.attend(q, k, v, mask=key_mask(mask))))
        if self.mlp is None or self.norm is None:
            return z
        return z + self.mlp(self.norm(z))


class MemoryAttention(nn.Module):
    r"""Tokens attend a learned memory that all images share, in time linear in the tokens.

    .. math::
        y = f_{norm}(f_{sim}(x W_q,\, M_k))\, M_v\, W_o

    Args:
        dim: Width of a token.
        num_heads: H; must divide ``dim``. Each head has its own memory.
        similarity: f_sim; None is Dot.
        normalize: f_norm; None is Double: softmax over the tokens, then l1 over the slots.
        num_slots: Keys and values in the memory.
        qkv_bias: Add a bias to the queries.

    Shape:
        - x: (B, N, dim); mask: bool (B, N); tokens where it is False give and get nothing. ``grid``
          has no effect.
        - Output: (B, N, dim).

    Map:
        (B, H, N, num_slots); rows sum to one where the normalizer says so.

    Raises:
        ValueError: ``num_heads`` does not divide ``dim``; ``num_slots`` is below 1.

    Reference:
        Guo et al. 2021, "Beyond Self-attention: External Attention using Two Linear Layers",
        section 3, https://arxiv.org/abs/2105.02358. Differs from: heads do not share the memory
        (one head is the paper's layer); residual, norm and ReLU of the authors' code lie outside.

    Example:
        >>> MemoryAttention(12, 3, num_slots=5)(torch.rand(2, 35, 12)).shape
        torch.Size([2, 35, 12])
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        *,
        similarity: Similarity | None = None,
        normalize: Normalizer | None = None,
        num_slots: int = 64,
        qkv_bias: bool = True,
    ):
        super().__init__()
        head_dim = width_per_head(dim, num_heads)
        if num_slots < 1:
            raise ValueError(f"num_slots must be at least 1; got {num_slots}")
        self.num_heads = num_heads
        self.q = nn.Linear(dim, dim, bias=qkv_bias)
        memory = torch.randn(2, num_heads, num_slots, head_dim) * head_dim**-0.5
        self.keys = nn.Parameter(memory[0].clone())
        self.values = nn.Parameter(memory[1].clone())
        similarity = Dot(head_dim, num_heads) if similarity is None else similarity
        normalize = Double(num_heads) if normalize is None else normalize
        self.attend = Attend(similarity, normalize)
        self.proj = nn.Linear(dim, dim)

    def forward(
        self, x: Tensor, *, grid: tuple[int, int] | None = None, mask: Tensor | None = None
    ) -> Tensor:
        q = split_heads(self.q(x), self.num_heads)
        # the memory (H, slots, D) serves every image: (B, H, slots, D)
        k = self.keys.expand(x.shape[0], -1, -1, -1)
        v = self.values.expand(x.shape[0], -1, -1, -1)
        # masked tokens do not act as queries; every slot is a key
        query_mask = None if mask is None else mask[:, None, :, None]
        m = self.attend(q, k, v, mask=query_mask)
        return self.proj(merge_heads(m))


def _mlp(dim: int, hidden: int) -> nn.Module:
    """Return two linear layers with timm's names, fc1 and fc2."""
    mlp = nn.Sequential()
    mlp.add_module("fc1", nn.Linear(dim, hidden))
    mlp.add_module("act", nn.GELU())
    mlp.add_module("fc2", nn.Linear(hidden, dim))
    return mlp
