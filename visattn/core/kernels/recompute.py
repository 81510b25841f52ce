"""The tiled evaluation of pairs without row functions.

It evaluates the definition on a few query rows at a time, and again in the backward pass.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from visattn.core.kernels.tiles import Tile, cut, cut_optional, tiles
from visattn.core.normalize.definition import Normalizer
from visattn.core.similarity.definition import Similarity

_TILE_BYTES = 1024 * 1024

Inputs = tuple[Tensor, Tensor, Tensor, Tensor | None]
"""q, k, v and bias, or something of each of them."""

TileFunction = Callable[..., Tensor]
"""(q, k, v, bias, mask, heads) of one tile -> m of the tile."""


def recomputed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    similarity: Similarity,
    normalize: Normalizer,
    bias: Tensor | None,
    mask: Tensor | None,
    dropout: float,
) -> Tensor:
    """Return m by tiles of query rows; correct for every row-local pair."""

    def attend_tile(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        bias: Tensor | None,
        mask: Tensor | None,
        heads: slice,
    ) -> Tensor:
        e = _call_heads(similarity, heads, q, k)
        if bias is not None:
            e = e + bias
        alpha = _call_heads(normalize, heads, e, mask).to(v.dtype)
        if dropout:
            alpha = F.dropout(alpha, dropout)
        return alpha @ v

    shape = (*q.shape[:3], k.shape[2])
    scores = _TILE_BYTES // (q.element_size() * similarity.tile_width)
    if torch.compiler.is_compiling():
        batch, heads, _, keys = shape
        rows = max(1, scores // (batch * heads * keys))
        return _checkpointed(attend_tile, rows, q, k, v, bias, mask)
    head_local = similarity.head_local and normalize.head_local
    cuts = list(tiles(shape, scores, head_local=head_local))
    parameters = [*similarity.parameters(), *normalize.parameters()]
    return _Recomputed.apply(attend_tile, cuts, q, k, v, bias, mask, *parameters)


def _call_heads(
    module: Similarity | Normalizer,
    heads: slice,
    x: Tensor,
    argument: Tensor | None,
) -> Tensor:
    """Call a similarity or normalizer for a range of its heads."""
    if module.num_heads == 1 or heads in (slice(None), slice(0, module.num_heads)):
        return module(x, argument)
    # The first axis of every parameter and buffer is that of the heads.
    state = {}
    for name, value in chain(module.named_parameters(), module.named_buffers()):
        state[name] = value[heads]
    return functional_call(module, state, (x, argument))


def _checkpointed(
    function: TileFunction,
    rows: int,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
) -> Tensor:
    """Evaluate tiles of whole images and heads in the form that the compiler can trace."""
    outputs = []
    for start in range(0, q.shape[2], rows):
        tile = Tile(slice(None), slice(None), slice(start, start + rows))
        m = checkpoint(
            function,
            cut(q, tile),
            k,
            v,
            cut_optional(bias, tile),
            cut_optional(mask, tile),
            tile.heads,
            use_reentrant=False,
            preserve_rng_state=False,
        )
        outputs.append(m)
    return torch.cat(outputs, 2)


def _random_state(device: torch.device) -> Tensor:
    if device.type == "cuda":
        return torch.cuda.get_rng_state(device)
    return torch.get_rng_state()


@contextmanager
def _restored_random_state(device: torch.device, state: Tensor) -> Iterator[None]:
    """Draw the random numbers of the forward pass again."""
    if device.type == "cuda":
        with torch.random.fork_rng([device]):
            torch.cuda.set_rng_state(state, device)
            yield
    else:
        with torch.random.fork_rng([]):
            torch.set_rng_state(state)
            yield


def _autocast_dtype(device_type: str) -> torch.dtype | None:
    """Return the dtype in which autocast computes now; None where it is off."""
    if not torch.amp.is_autocast_available(device_type):
        return None
    if not torch.is_autocast_enabled(device_type):
        return None
    return torch.get_autocast_dtype(device_type)


@contextmanager
def _restored_autocast(
    device_type: str,
    dtype: torch.dtype | None,
) -> Iterator[None]:
    """Compute as autocast did in the forward pass, also where backward runs inside of another.

    ``dtype`` is None where it was off.
    """
    if not torch.amp.is_autocast_available(device_type):
        yield
        return
    with torch.autocast(device_type, dtype=dtype, enabled=dtype is not None):
        yield


class _Recomputed(torch.autograd.Function):
    """One output buffer and one buffer per gradient, written in place.

    A list of tile outputs to concatenate would fragment the heap.
    """

    @staticmethod
    def forward(
        ctx: Any,
        function: TileFunction,
        cuts: list[Tile],
        q: Tensor,
        k: Tensor,
        v: Tensor,
        bias: Tensor | None,
        mask: Tensor | None,
        *parameters: nn.Parameter,
    ) -> Tensor:
        ctx.function = function
        ctx.cuts = cuts
        ctx.parameters = parameters
        ctx.random_state = _random_state(q.device)
        ctx.autocast_dtype = _autocast_dtype(q.device.type)
        ctx.save_for_backward(q, k, v, bias, mask)
        m = v.new_empty((*q.shape[:3], v.shape[3]))
        for tile in cuts:
            inputs = _cut_inputs(tile, q, k, v, bias)
            m[tile] = function(*inputs, cut_optional(mask, tile), tile.heads)
        return m

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any,
        grad: Tensor,
    ) -> tuple[Tensor | None, ...]:
        q, k, v, bias, mask = ctx.saved_tensors
        inputs = (q, k, v, bias)
        learned = [x for x in ctx.parameters if x.requires_grad]
        sums = _GradientSums(inputs, learned)
        random_state = _restored_random_state(grad.device, ctx.random_state)
        autocast = _restored_autocast(grad.device.type, ctx.autocast_dtype)
        with torch.enable_grad(), random_state, autocast:
            for tile in ctx.cuts:
                sums.add_tile(ctx.function, tile, mask, grad)
        learned_grads = iter(sums.of_parameters)
        parameter_grads = []
        for parameter in ctx.parameters:
            parameter_grads.append(next(learned_grads) if parameter.requires_grad else None)
        # None for function, cuts and mask
        return (None, None, *sums.of_inputs, None, *parameter_grads)


class _GradientSums:
    """The gradients of q, k, v, bias and the parameters, summed over tiles."""

    def __init__(self, inputs: Inputs, parameters: list[nn.Parameter]):
        q, k, v, bias = inputs
        self.inputs = inputs
        self.parameters = parameters
        self.of_inputs: Inputs = (
            torch.zeros_like(q),
            torch.zeros_like(k),
            torch.zeros_like(v),
            None if bias is None else torch.zeros_like(bias),
        )
        self.of_parameters = [torch.zeros_like(x) for x in parameters]

    def add_tile(
        self,
        function: TileFunction,
        tile: Tile,
        mask: Tensor | None,
        grad: Tensor,
    ) -> None:
        """Evaluate one tile again and add what it contributes."""
        leaves = []
        for x in _cut_inputs(tile, *self.inputs):
            leaves.append(None if x is None else x.detach().requires_grad_())
        m = function(*leaves, cut_optional(mask, tile), tile.heads)
        sources = [x for x in leaves if x is not None]
        sums = [x for x in _cut_inputs(tile, *self.of_inputs) if x is not None]
        sources += self.parameters
        sums += self.of_parameters
        gradients = torch.autograd.grad(m, sources, grad[tile], allow_unused=True)
        for total, gradient in zip(sums, gradients, strict=True):
            if gradient is not None:
                total += gradient


def _cut_inputs(
    tile: Tile,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
) -> Inputs:
    """Cut what a tile reads: its own queries, and all keys of its images and heads."""
    block = (tile.batch, tile.heads)
    return q[tile], k[block], v[block], cut_optional(bias, tile)
