"""Positions that a query reads itself: one learned vector for every row offset and for every column offset."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from visattn.core.position.bias import needed
from visattn.core.position.coordinates import Coordinates, repeat_for_batch
from visattn.core.similarity.definition import Similarity
from visattn.core.similarity.product import ScaledDot

Pair = tuple[int, int]


class Decomposed(nn.Module):
    r"""Add to a score what the query says about the row offset and the column offset.

    .. math::
        e'_{ij} = e_{ij} + q_i \cdot R^y_{y_i - y_j} + q_i \cdot R^x_{x_i - x_j}

    The two terms become rows + columns more channels of query and key, so that no N x N matrix is
    formed: the query carries its product with every row's and column's vector, the key points out
        its own row and column. ``widen`` makes
    a similarity that keeps these channels apart.

    Args:
        head_dim: D.
        num_heads: Without effect: heads share the vectors.
        grid: Rows and columns whose offsets have a vector. Larger ones get theirs by linear
            interpolation.

    Shape:
        - Input: q (B, H, Nq, D), k (B, H, Nk, D) and their Coordinates.
        - Output: q, k (.., D + rows + columns), and None for the bias.

    Map:
        None: it changes the scores.

    Raises:
        ValueError: ``grid`` is missing or below 1.

    Reference:
        Li et al. 2021, "MViTv2", https://arxiv.org/abs/2112.01526; Kirillov et al. 2023, SAM,
        https://arxiv.org/abs/2304.02643; Srinivas et al. 2021, BoTNet,
        https://arxiv.org/abs/2101.11605. Differs from: q is not scaled in the added terms, as in
        SAM's code; BoTNet scales it.

    Example:
        >>> from visattn.core.position import grid_coordinates
        >>> q = torch.rand(2, 3, 35, 4)
        >>> Decomposed(4, 3, (5, 7))(q, q, grid_coordinates((5, 7)))[0].shape
        torch.Size([2, 3, 35, 16])
    """

    def __init__(self, head_dim: int, num_heads: int = 1, grid: Pair | None = None):
        super().__init__()
        self.head_dim, self.grid = head_dim, needed(grid)
        self.rows = nn.Parameter(
            nn.init.trunc_normal_(torch.empty(2 * self.grid[0] - 1, head_dim), std=0.02)
        )
        self.columns = nn.Parameter(
            nn.init.trunc_normal_(torch.empty(2 * self.grid[1] - 1, head_dim), std=0.02)
        )

    def forward(
        self, q: Tensor, k: Tensor, coordinates: Coordinates
    ) -> tuple[Tensor, Tensor, None]:
        said, pointed = [], []
        for axis, vectors in enumerate((self.rows, self.columns)):
            extent, reach = coordinates.extent[axis], max(coordinates.reach[axis], self.grid[axis])
            line = torch.arange(extent, device=q.device)
            offset = coordinates.queries[..., axis, None] - line
            offset = (offset.clamp(1 - reach, reach - 1) + reach - 1)[:, None]
            words = q[:, :, q.shape[2] - offset.shape[2] :] @ _stretch(vectors, 2 * reach - 1).T.to(
                q.dtype
            )
            offset = repeat_for_batch(offset, q.shape[0]).expand(q.shape[0], q.shape[1], -1, -1)
            said.append(words.gather(-1, offset))
            pointed.append((coordinates.keys[..., axis, None] == line)[:, None].to(k.dtype))
        return (
            _append(q, torch.cat(said, -1)),
            _append(k, repeat_for_batch(torch.cat(pointed, -1), k.shape[0])),
            None,
        )


class _Widened(Similarity):
    """A similarity of the first ``head_dim`` channels, plus the inner product of the channels behind them."""

    def __init__(self, similarity: Similarity, head_dim: int):
        super().__init__(head_dim, similarity.num_heads)
        self.inner = similarity
        self.tile_width, self.head_local = similarity.tile_width, similarity.head_local

    def forward(self, q: Tensor, k: Tensor) -> Tensor:
        width = self.head_dim
        return self.inner(q[..., :width], k[..., :width]) + q[..., width:] @ k[
            ..., width:
        ].transpose(-2, -1)


class _WidenedProduct(_Widened):
    """The same where the first channels have an inner-product form."""

    def dot_form(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        width = self.head_dim
        first_q, first_k, bias = self.inner.dot_form(q[..., :width], k[..., :width])
        return (
            torch.cat([first_q, q[..., width:]], -1),
            torch.cat([first_k, k[..., width:]], -1),
            bias,
        )


def widen(similarity: Similarity | None, head_dim: int) -> Similarity:
    """Return the similarity that also reads the channels which Decomposed appends."""
    similarity = ScaledDot(head_dim) if similarity is None else similarity
    if not similarity.key_local:
        name = type(similarity).__name__
        raise ValueError(
            f"decomposed positions cannot join {name}, which normalizes a key's channels over all keys"
        )
    if similarity.has_dot_form:
        return _WidenedProduct(similarity, head_dim)
    return _Widened(similarity, head_dim)


def _stretch(vectors: Tensor, length: int) -> Tensor:
    """Interpolate vectors (offsets, D) to another number of offsets."""
    # An exported graph serves every length; at its own length interpolation changes nothing.
    if not torch.compiler.is_exporting() and len(vectors) == length:
        return vectors
    return F.interpolate(vectors.T[None], size=length, mode="linear", align_corners=False)[0].T


def _append(x: Tensor, channels: Tensor) -> Tensor:
    """Put channels behind those of x; tokens without a place get zeros."""
    channels = channels.expand(x.shape[0], x.shape[1], -1, -1)
    return torch.cat([x, F.pad(channels, (0, 0, x.shape[2] - channels.shape[2], 0))], dim=-1)
