"""Positions that a query reads itself: one learned vector for every row offset and for every column offset."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from visattn.core.position.bias import require_grid
from visattn.core.position.coordinates import Coordinates, repeat_for_batch
from visattn.core.position.definition import Position
from visattn.core.similarity.definition import Similarity
from visattn.core.similarity.product import ScaledDot

Pair = tuple[int, int]


class Decomposed(Position):
    r"""Add to a score what the query says about the row offset and the column offset.

    .. math::
        e'_{ij} = e_{ij} + q_i \cdot R^y_{y_i - y_j} + q_i \cdot R^x_{x_i - x_j}

    The two terms become rows + columns more channels of query and key, so that no N x N matrix is
    formed: the query carries its product with every row's and column's vector, the key points out
    its own row and column. ``widen`` makes a similarity that keeps these channels apart.

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
        self.head_dim = head_dim
        self.grid = require_grid(grid)
        self.rows = _offset_vectors(self.grid[0], head_dim)
        self.columns = _offset_vectors(self.grid[1], head_dim)

    def forward(
        self, q: Tensor, k: Tensor, coordinates: Coordinates
    ) -> tuple[Tensor, Tensor, None]:
        query_channels = []
        key_channels = []
        for axis, vectors in enumerate((self.rows, self.columns)):
            query_channels.append(self._products(q, coordinates, axis, vectors))
            key_channels.append(_one_hot(k, coordinates, axis))
        q = _append(q, torch.cat(query_channels, -1))
        k = _append(k, torch.cat(key_channels, -1))
        return q, k, None

    def widen(self, similarity: Similarity | None) -> Similarity:
        """Return the similarity that also reads the channels which ``forward`` appends.

        Raises:
            ValueError: A key's score depends on the channels of the other keys.
        """
        similarity = ScaledDot(self.head_dim) if similarity is None else similarity
        if not similarity.key_local:
            name = type(similarity).__name__
            raise ValueError(
                f"decomposed positions cannot join {name}, which normalizes a key's channels "
                "over all keys"
            )
        if similarity.has_dot_form:
            return _WidenedProduct(similarity, self.head_dim)
        return _Widened(similarity, self.head_dim)

    def _products(self, q: Tensor, coordinates: Coordinates, axis: int, vectors: Tensor) -> Tensor:
        """Return q times the vector of its offset to each row (or column): (B, H, N, extent)."""
        extent = coordinates.extent[axis]
        reach = max(coordinates.reach[axis], self.grid[axis])
        line = torch.arange(extent, device=q.device)
        offset = coordinates.queries[..., axis, None] - line  # (G, N, extent)
        # Pairs further apart than the reach do not meet; they read the edge of the table.
        index = (offset.clamp(1 - reach, reach - 1) + reach - 1)[:, None]
        prefix = q.shape[2] - index.shape[2]
        stretched = _stretch(vectors, 2 * reach - 1).T.to(q.dtype)
        products = q[:, :, prefix:] @ stretched  # (B, H, N, offsets)
        index = repeat_for_batch(index, q.shape[0]).expand(q.shape[0], q.shape[1], -1, -1)
        return products.gather(-1, index)


def _offset_vectors(size: int, head_dim: int) -> nn.Parameter:
    """Return one vector for every offset within ``size`` tokens."""
    vectors = torch.empty(2 * size - 1, head_dim)
    return nn.Parameter(nn.init.trunc_normal_(vectors, std=0.02))


def _one_hot(k: Tensor, coordinates: Coordinates, axis: int) -> Tensor:
    """Point out the row (or column) of each key: (B or 1, 1, N, extent)."""
    line = torch.arange(coordinates.extent[axis], device=k.device)
    is_here = coordinates.keys[..., axis, None] == line  # (G, N, extent)
    return repeat_for_batch(is_here[:, None].to(k.dtype), k.shape[0])


class _Widened(Similarity):
    """A similarity of the first ``head_dim`` channels, plus the inner product of the others."""

    def __init__(self, similarity: Similarity, head_dim: int):
        super().__init__(head_dim, similarity.num_heads)
        self.inner = similarity
        self.tile_width = similarity.tile_width
        self.head_local = similarity.head_local

    def forward(self, q: Tensor, k: Tensor) -> Tensor:
        width = self.head_dim
        e = self.inner(q[..., :width], k[..., :width])
        return e + q[..., width:] @ k[..., width:].transpose(-2, -1)


class _WidenedProduct(_Widened):
    """The same where the first channels have an inner-product form."""

    def dot_form(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        width = self.head_dim
        form = self.inner.dot_form(q[..., :width], k[..., :width])
        assert form is not None, "widen asks for one first"
        inner_q, inner_k, bias = form
        wide_q = torch.cat([inner_q, q[..., width:]], -1)
        wide_k = torch.cat([inner_k, k[..., width:]], -1)
        return wide_q, wide_k, bias


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
