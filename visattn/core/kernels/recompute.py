"""The tiled evaluation of pairs without a kernel: the definition on a few query rows, formed again in the backward."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from itertools import chain

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from visattn.core.kernels.tiles import Tile, part, tiles

_TILE_BYTES = 1024 * 1024


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

    def piece(
        q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, mask: Tensor | None, heads: slice
    ) -> Tensor:
        e = _of_heads(similarity, heads, q, k)
        alpha = _of_heads(normalize, heads, e if bias is None else e + bias, mask).to(v.dtype)
        return F.dropout(alpha, dropout) @ v if dropout else alpha @ v

    shape = (*q.shape[:3], k.shape[2])
    scores = _TILE_BYTES // (q.element_size() * similarity.tile_width)
    if torch.compiler.is_compiling():
        return _checkpointed(
            piece, max(1, scores // (shape[0] * shape[1] * shape[3])), q, k, v, bias, mask
        )
    cuts = list(tiles(shape, scores, head_local=similarity.head_local and normalize.head_local))
    parameters = [*similarity.parameters(), *normalize.parameters()]
    return _Recomputed.apply(piece, cuts, q, k, v, bias, mask, *parameters)


def _of_heads(module: nn.Module, heads: slice, x: Tensor, other: Tensor | None) -> Tensor:
    """Call a similarity or normalizer for a range of its heads."""
    if module.num_heads == 1 or heads in (slice(None), slice(0, module.num_heads)):
        return module(x, other)
    state = chain(module.named_parameters(), module.named_buffers())
    return functional_call(module, {name: value[heads] for name, value in state}, (x, other))


def _checkpointed(piece: Callable, count: int, q, k, v, bias, mask) -> Tensor:
    """The form that the compiler can look into."""
    pieces = []
    for start in range(0, q.shape[2], count):
        tile = Tile(slice(None), slice(None), slice(start, start + count))
        arguments = (
            part(q, tile),
            k,
            v,
            *(None if x is None else part(x, tile) for x in (bias, mask)),
            tile.heads,
        )
        pieces.append(checkpoint(piece, *arguments, use_reentrant=False, preserve_rng_state=False))
    return torch.cat(pieces, 2)


@contextmanager
def _random_state(device: torch.device, state: Tensor) -> Iterator[None]:
    """Draw the random numbers of the forward pass again."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.cuda.set_rng_state(state, device) if device.type == "cuda" else torch.set_rng_state(
            state
        )
        yield


def _autocast_dtype(kind: str) -> torch.dtype | None:
    """Return what autocast computes in now; None where it is off."""
    on = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return torch.get_autocast_dtype(kind) if on else None


@contextmanager
def _precision(device: torch.device, dtype: torch.dtype | None) -> Iterator[None]:
    """Compute as autocast did in the forward pass; None where it was off, also where backward runs inside of one."""
    available = torch.amp.is_autocast_available(device.type)
    with (
        torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)
        if available
        else nullcontext()
    ):
        yield


class _Recomputed(torch.autograd.Function):
    """One output buffer and one buffer per gradient, written in place: no list of pieces that splinters the heap."""

    @staticmethod
    def forward(ctx, piece, cuts, q, k, v, bias, mask, *parameters):
        ctx.piece, ctx.cuts, ctx.parameters = piece, cuts, parameters
        ctx.state = torch.cuda.get_rng_state(q.device) if q.is_cuda else torch.get_rng_state()
        ctx.autocast = _autocast_dtype(q.device.type)
        ctx.save_for_backward(q, k, v, bias, mask)
        m = v.new_empty((*q.shape[:3], v.shape[3]))
        for tile in cuts:
            m[tile] = piece(*_cut(tile, q, k, v, bias, mask), tile.heads)
        return m

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        *inputs, mask = ctx.saved_tensors
        parameters = [x for x in ctx.parameters if x.requires_grad]
        totals = [None if x is None else torch.zeros_like(x) for x in (*inputs, *parameters)]
        state, precision = (
            _random_state(grad.device, ctx.state),
            _precision(grad.device, ctx.autocast),
        )
        with torch.enable_grad(), state, precision:
            for tile in ctx.cuts:
                _add_gradients(ctx.piece, tile, inputs, mask, parameters, grad, totals)
        of_parameters = iter(totals[4:])
        found = (next(of_parameters) if x.requires_grad else None for x in ctx.parameters)
        return (None, None, *totals[:4], None, *found)


def _add_gradients(
    piece: Callable, tile: Tile, inputs, mask, parameters, grad: Tensor, totals: list
) -> None:
    """Add what one tile gives to the gradients of q, k, v, bias and the parameters."""
    *own, allowed = _cut(tile, *inputs, mask)
    own = [None if x is None else x.detach().requires_grad_() for x in own]
    m = piece(*own, allowed, tile.heads)
    places = [*_cut(tile, *totals[:4], None)[:4], *totals[4:]]
    wanted = [
        (x, place) for x, place in zip((*own, *parameters), places, strict=True) if x is not None
    ]
    found = torch.autograd.grad(m, [x for x, _ in wanted], grad[tile], allow_unused=True)
    for (_, place), gradient in zip(wanted, found, strict=True):
        if gradient is not None:
            place += gradient


def _cut(tile: Tile, q, k, v, bias, mask) -> list[Tensor | None]:
    """Cut what a tile reads: all keys of its images and heads."""
    keys = (tile.batch, tile.heads)
    return [
        q[tile],
        k[keys],
        v[keys],
        *(None if x is None else part(x, tile) for x in (bias, mask)),
    ]
