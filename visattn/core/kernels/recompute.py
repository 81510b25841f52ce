"""The tiled evaluation of pairs without a kernel: the definition on a few query rows, formed again in the backward."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

_TILE_BYTES = 1024 * 1024


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
    """Return m by tiles of query rows; correct for every row-local pair."""

    def tile(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, mask: Tensor | None) -> Tensor:
        e = similarity(q, k)
        alpha = normalize(e if bias is None else e + bias, mask).to(v.dtype)
        return F.dropout(alpha, dropout) @ v if dropout else alpha @ v

    entry = q.element_size() * similarity.tile_width
    count = max(1, _TILE_BYTES // (entry * q.shape[0] * q.shape[1] * k.shape[2]))
    if torch.compiler.is_compiling():
        return _checkpointed(tile, count, q, k, v, bias, mask)
    parameters = [*similarity.parameters(), *normalize.parameters()]
    return _Recomputed.apply(tile, count, q, k, v, bias, mask, *parameters)


def _ranges(queries: int, count: int) -> Iterator[slice]:
    return (slice(start, start + count) for start in range(0, queries, count))


def _checkpointed(tile: Callable, count: int, q, k, v, bias, mask) -> Tensor:
    """The form that the compiler can look into."""
    pieces = []
    for rows in _ranges(q.shape[2], count):
        arguments = (q[:, :, rows], k, v, rows_of(bias, rows), rows_of(mask, rows))
        pieces.append(checkpoint(tile, *arguments, use_reentrant=False, preserve_rng_state=False))
    return torch.cat(pieces, 2)


@contextmanager
def _random_state(device: torch.device, state: Tensor) -> Iterator[None]:
    """Draw the random numbers of the forward pass again."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.cuda.set_rng_state(state, device) if device.type == "cuda" else torch.set_rng_state(state)
        yield


class _Recomputed(torch.autograd.Function):
    """One output buffer and one buffer per gradient, written in place: no list of pieces that splinters the heap."""

    @staticmethod
    def forward(ctx, tile, count, q, k, v, bias, mask, *parameters):
        ctx.tile, ctx.count, ctx.parameters = tile, count, parameters
        ctx.state = torch.cuda.get_rng_state(q.device) if q.is_cuda else torch.get_rng_state()
        ctx.save_for_backward(q, k, v, bias, mask)
        m = v.new_empty((*q.shape[:3], v.shape[3]))
        for rows in _ranges(q.shape[2], count):
            m[:, :, rows] = tile(q[:, :, rows], k, v, rows_of(bias, rows), rows_of(mask, rows))
        return m

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        q, k, v, bias, mask = ctx.saved_tensors
        shared = [x.detach().requires_grad_() for x in (k, v)] + [p for p in ctx.parameters if p.requires_grad]
        totals = [torch.zeros_like(x) for x in shared]
        dq, dbias = torch.empty_like(q), None if bias is None else torch.zeros_like(bias)
        with torch.enable_grad(), _random_state(q.device, ctx.state):
            for rows in _ranges(q.shape[2], ctx.count):
                own = [None if x is None else x.detach().requires_grad_() for x in (q[:, :, rows], rows_of(bias, rows))]
                m = ctx.tile(own[0], *shared[:2], own[1], rows_of(mask, rows))
                wanted = [x for x in (*own, *shared) if x is not None]
                found = list(
                    torch.autograd.grad(m, wanted, grad[:, :, rows], allow_unused=True, materialize_grads=True)
                )
                dq[:, :, rows] = found.pop(0)
                if bias is not None:
                    rows_of(dbias, rows).add_(found.pop(0))
                for total, part in zip(totals, found, strict=True):
                    total += part
        dparameters = iter(totals[2:])
        return (
            None,
            None,
            dq,
            *totals[:2],
            dbias,
            None,
            *(next(dparameters) if p.requires_grad else None for p in ctx.parameters),
        )
