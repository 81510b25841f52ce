"""Record: one attention call, and the one thing every method does with it: u A."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from visattn.core.formula import attention_map
from visattn.core.gpu import row_chain
from visattn.core.normalize.definition import Normalizer
from visattn.core.similarity.definition import Similarity
from visattn.record.space import Space

TILE = 2**21  # weights computed at a time: 8 MiB in float32, which stays in the last-level cache


@dataclass(eq=False)
class Record:
    r"""One attention call as it was seen: enough to give any row of its map A, and u A, without the N x N matrix.

    .. math::
        uA = \sum_{\text{blocks } b} u_b \, f_{norm}(f_{sim}(Q_b, K))

    Args:
        name: Path of the module that attended; ``[i]`` is added where one module attended more than
            once.
        kind: ``"token"``, or what a gate weighs: ``"channel"``, ``"spatial"``, ``"branch"``.
        batch: B, the number of images.
        queries, keys: Where the two sides lie in the picture. G groups (windows) are folded into
            the batch.
        q, k: (B * G, H, Nq, D) and (B * G, H, Nk, D), or None where only weights were seen.
        alpha: The weights themselves: (B * G, H, Nq, Nk), or the values of a gate.
        row_kept: (B, H, keys.tokens), the only row that was kept: the class token's, or the mean
            over queries.
        scale: Factor of the dot product where it is not 1 / sqrt(D).
        bias, mask: As in `visattn.attend`.
        pair: The similarity and the normalization, None standing for a scaled dot product and for
            softmax.
        v, output: Values and the tensor to differentiate, only while gradients are wanted.
        gradient: Gradient of the score at ``output``.
        energy: (B, h, w) what passes a channel gate: the absolute features weighed by the gate,
            summed over channels.
        block: Path of the residual block around the attention, or "".
        pool: Whether the queries are no tokens of the picture: a learned query, a recurrent state.

    Shape:
        - ``rows(slice)``: (B * G, H, r, Nk).
        - ``apply(u)``: u (B, queries.tokens) to (B, keys.tokens).

    Example:
        >>> space = Space(6, 0, (2, 3))
        >>> record = Record("attn", "token", 1, space, space, q=torch.rand(1, 2, 6, 5), k=torch.rand(1, 2, 6, 5))
        >>> record.heads, round(record.apply(torch.full((1, 6), 1 / 6)).sum().item(), 4)
        (2, 1.0)
    """

    name: str
    kind: str
    batch: int
    queries: Space
    keys: Space
    q: Tensor | None = None
    k: Tensor | None = None
    alpha: Tensor | None = None
    row_kept: Tensor | None = None
    scale: float | None = None
    bias: Tensor | None = None
    mask: Tensor | None = None
    pair: tuple[Similarity | None, Normalizer | None] = (None, None)
    v: Tensor | None = None
    output: Tensor | None = None
    gradient: Tensor | None = None
    energy: Tensor | None = None
    block: str = ""
    pool: bool = False

    @property
    def heads(self) -> int:
        """How many maps the layer holds side by side: heads of attention, channels or branches of a gate."""
        return next(x.shape[1] for x in (self.q, self.alpha, self.row_kept) if x is not None)

    @property
    def grid(self) -> tuple[int, int] | None:
        """(h, w) of the patches attended to."""
        return self.keys.grid

    @property
    def prefix(self) -> int:
        """Tokens before the patches attended to: class, registers, distillation."""
        return self.keys.prefix

    @property
    def nbytes(self) -> int:
        """Bytes held by this record."""
        held = (
            self.q,
            self.k,
            self.alpha,
            self.row_kept,
            self.bias,
            self.mask,
            self.v,
            self.gradient,
            self.energy,
        )
        return sum(x.untyped_storage().nbytes() for x in held if x is not None)

    def rows(self, rows: slice) -> Tensor:
        """Return the weights of some queries (of every group): (B * G, H, r, Nk)."""
        if self.alpha is not None:
            return _wide(self.alpha[:, :, rows])
        if self.q is None:
            raise ValueError(
                f"{self.name!r} kept one row only; capture with keep='qk' or 'maps' for the others"
            )
        if self._plain():
            return self._softmax(rows)
        own = next(
            (p.dtype for part in self.pair if part is not None for p in part.parameters()), None
        )
        q, k = (_wide(x) if own is None else x.to(own) for x in (self.q, self.k))
        q = q if self.scale is None else q * (self.scale * q.shape[-1] ** 0.5)
        return _wide(attention_map(q, k, *self.pair, bias=self.bias, mask=self.mask, rows=rows))

    def _plain(self) -> bool:
        """Whether the weights are nothing but a softmax of scaled dots: by far the most, and asked for row by row."""
        bare = self.pair == (None, None) and self.bias is None and self.mask is None
        return bare and self.q.shape[1] == self.k.shape[1]

    def _softmax(self, rows: slice) -> Tensor:
        q, k = _wide(self.q[:, :, rows]), _wide(self.k)
        scale = q.shape[-1] ** -0.5 if self.scale is None else self.scale
        return torch.softmax((q * scale) @ k.transpose(-2, -1), -1)

    def weights(self) -> Tensor:
        """Return the whole map, (B * G, H, Nq, Nk)."""
        return self.rows(slice(None))

    def row(self, token: int) -> Tensor:
        """Return the weights of one query token over all tokens of the picture: (B, H, keys.tokens)."""
        group, place = self.queries.find(token)
        alpha = self.rows(slice(place, place + 1))
        if self.keys.index is None and self.queries.index is None:
            return alpha[:, :, 0]
        mine = alpha.new_zeros(alpha.shape).unflatten(0, (self.batch, -1))
        mine[:, group] = alpha.unflatten(0, (self.batch, -1))[:, group]
        return self.keys.unfold(mine.flatten(0, 1)[:, :, 0])

    def apply(self, u: Tensor, tile: Callable[[slice], Tensor] | None = None) -> Tensor:
        """Return u A of (B, queries.tokens), A the mean over heads.

        ``tile(rows)`` puts other weights in place of A: (B * G, H, r, Nk), or (B * G, r, Nk) with
        the heads joined.
        """
        return (self.apply_heads(u) if tile is None else self._sweep(u, tile)).mean(1)

    def apply_heads(self, u: Tensor) -> Tensor:
        """Return u A for every head: (B, H, keys.tokens)."""
        carried = self._carried(u, None)
        return self._sweep(u, self.rows) if carried is None else carried

    def apply_positive(self, u: Tensor) -> Tensor | None:
        """Return u A of (B, queries.tokens), A the mean over heads of [A o G]+, G = dO V^T, by a fused GPU kernel.

        None where none serves this record.
        """
        if self.v is None or self.q is None:
            return None
        group = self.q.shape[1] // self.v.shape[1]
        v = self.v if group == 1 else self.v.repeat_interleave(group, 1)
        carried = self._carried(u, (self.gradient.reshape(*v.shape[:2], -1, v.shape[3]), v))
        return None if carried is None else carried.mean(1)

    def _carried(self, u: Tensor, weighed: tuple[Tensor, Tensor] | None) -> Tensor | None:
        if self.alpha is not None or self.q is None:
            return None
        own = next(
            (p.dtype for part in self.pair if part is not None for p in part.parameters()),
            self.q.dtype,
        )
        options = {"bias": self.bias, "mask": self.mask, "scale": self.scale, "weighed": weighed}
        moved = row_chain(
            self.queries.fold(u), self.q.to(own), self.k.to(own), self.pair, **options
        )
        return None if moved is None else self.keys.unfold(moved)

    def _sweep(self, u: Tensor, tile: Callable[[slice], Tensor]) -> Tensor:
        u, total = self.queries.fold(u)[:, None, None], 0
        asked = (
            u.flatten(0, 2).any(0).nonzero()[:, 0]
        )  # at the top of a chain often one token alone
        first, last = (int(asked[0]), int(asked[-1])) if len(asked) else (0, 0)
        step = self._tile_rows(u.shape[-1])
        for start in range(first, last + 1, step):
            rows = slice(start, min(start + step, last + 1))
            alpha = tile(rows)
            alpha = alpha[:, None] if alpha.ndim == 3 else alpha
            total = total + (u[..., rows].to(alpha.dtype) @ alpha)[:, :, 0]
        return self.keys.unfold(total)

    def _tile_rows(self, queries: int) -> int:
        if self.alpha is not None or not getattr(self.pair[1], "row_local", True):
            return queries
        return max(1, TILE // (self.k.shape[0] * self.heads * self.k.shape[2]))

    def __repr__(self) -> str:
        where = f"grid {self.grid[0]}x{self.grid[1]}" if self.grid else f"{self.keys.tokens} keys"
        prefix = f", {self.prefix} prefix tokens" if self.prefix else ""
        return f"Record({self.name!r}, {self.kind}, {self.heads} heads, {where}{prefix})"


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
