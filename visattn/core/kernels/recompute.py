"""The tiled evaluation of pairs without a kernel: the definition on a few query rows, formed again in the backward."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

_TILE_BYTES = 2 * 1024 * 1024


def rows_of(x: Tensor | None, rows) -> Tensor | None:
    """Cut the query axis of a bias or mask, where it has one."""
    return x if x is None or x.shape[2] == 1 else x[:, :, rows]


def recomputed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    similarity: nn.Module,
    normalize: nn.Module,
    bias: Tensor | None,
    mask: Tensor | None,
    dropout: float,
) -> Tensor:
    """Return m by tiles of query rows under checkpointing; correct for every row-local pair."""

    def tile(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, mask: Tensor | None) -> Tensor:
        e = similarity(q, k)
        alpha = normalize(e if bias is None else e + bias, mask).to(v.dtype)
        return F.dropout(alpha, dropout) @ v if dropout else alpha @ v

    entry = q.element_size() * similarity.tile_width
    count = max(1, _TILE_BYTES // (entry * q.shape[0] * q.shape[1] * k.shape[2]))
    pieces = []
    for start in range(0, q.shape[2], count):
        rows = slice(start, start + count)
        piece = (q[:, :, rows], k, v, rows_of(bias, rows), rows_of(mask, rows))
        pieces.append(checkpoint(tile, *piece, use_reentrant=False, preserve_rng_state=dropout > 0))
    return torch.cat(pieces, 2)
