"""Which evaluation serves a call, why, and the evaluations themselves."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from visattn.core import gpu
from visattn.core.call import Call, alpha_of, both, inner_form, name_of
from visattn.core.kernels.associative import associative
from visattn.core.kernels.blocked import blocked, row_lse
from visattn.core.kernels.recompute import recomputed
from visattn.core.kernels.sdpa import extend, fused
from visattn.core.normalize.doubly import Double, Sinkhorn
from visattn.core.normalize.exponential import Softmax, Softmax1
from visattn.core.normalize.linear import L1, Uniform
from visattn.core.similarity.product import ScaledDot

IMPLS = ("auto", "sdpa", "associative", "blocked", "triton", "dense")


@dataclass(frozen=True)
class Plan:
    """How a pair will be evaluated, and why; ``str`` gives one line."""

    impl: str
    why: str

    def __str__(self) -> str:
        return f"{self.impl}: {self.why}"


def choose(call: Call) -> Plan:
    """Choose the first evaluation that serves the call exactly and without an N x N matrix."""
    if call.dropout and not (call.q.is_cuda and refuses(call, "sdpa") is None):
        if call.normalize.row_local and not call.normalize.stochastic:
            return Plan(
                "blocked",
                "dropout of the weights leaves the fused kernel, so tiles are formed again",
            )
        return Plan("dense", f"dropout with {name_of(call.normalize)} needs the whole matrix")
    if _padding_costs_more(call):
        return Plan(
            "blocked",
            "values are so much wider than keys that padding costs more than tiles formed again",
        )
    gpu.warn_of_tiles(call)
    for impl in ("associative", "sdpa", "triton", "blocked"):
        if refuses(call, impl) is None:
            return Plan(impl, _reason(call, impl))
    return Plan("dense", f"the whole matrix is needed: {refuses(call, 'blocked')}")


def _padding_costs_more(call: Call) -> bool:
    """Tell whether the fused CPU kernel, which wants one width, loses to tiles (measured: keys 32, values 256 wide)."""
    wide = call.shared_v.shape[3] > call.q.shape[3] + 128
    return (
        wide
        and call.q.device.type == "cpu"
        and type(call.normalize) is Softmax
        and call.similarity.has_dot_form
    )


def _reason(call: Call, impl: str) -> str:
    pair = f"{name_of(call.similarity)} x {name_of(call.normalize)}"
    if impl == "associative":
        return f"{pair} is a product of features: (K^T V) comes first, linear in tokens"
    if impl == "triton":
        return f"{pair} has a fused GPU kernel of its own"
    if impl == "blocked":
        why = f" (no fused kernel: {refuses(call, 'triton')})" if gpu.missing(call) is None else ""
        return f"{pair} goes row by row: query tiles, formed again in the backward pass{why}"
    if type(call.similarity) is ScaledDot and type(call.normalize) is Softmax:
        return "scaled_dot x softmax is what the fused kernel computes"
    return f"{pair} is rewritten, exactly, for the fused kernel"


def refuses(call: Call, impl: str) -> str | None:
    """Return why an evaluation cannot serve the call; None where it can."""
    pair = f"{name_of(call.similarity)} x {name_of(call.normalize)}"
    normalize = call.normalize
    if impl == "dense":
        return None
    if impl == "triton":
        return gpu.refuses(call)
    if impl == "blocked":
        if not normalize.row_local:
            return f"rows of {name_of(normalize)} depend on each other"
        if normalize.stochastic and normalize.training:
            return f"{name_of(normalize)} draws noise for the whole matrix"
        return None
    if not call.similarity.has_dot_form:
        return f"{name_of(call.similarity)} is no inner product"
    if impl == "sdpa":
        fits = {Softmax, Softmax1, Double, Sinkhorn}
        return (
            None
            if type(normalize) in fits
            else f"{name_of(normalize)} cannot be rewritten as a softmax"
        )
    if type(normalize) not in {L1, Uniform}:
        return f"{name_of(normalize)} is not linear in the scores"
    if isinstance(normalize, L1) and not call.similarity.nonnegative:
        return f"the row sum of {pair} needs every score"
    return (
        None
        if call.key_mask_only()
        else "a bias, or a mask that differs by query, needs every score"
    )


def require(call: Call, impl: str) -> None:
    if impl not in IMPLS:
        raise ValueError(f"impl must be one of {', '.join(IMPLS)}; got {impl!r}")
    why = refuses(call, impl)
    if why is None and call.dropout and impl == "associative":
        why = "dropout of the weights needs every score"
    if why is not None:
        raise ValueError(
            f"impl={impl!r} cannot serve this call: {why}; auto would take {choose(call)}"
        )


def _dense(call: Call) -> Tensor:
    alpha = alpha_of(call, call.q, call.bias, call.mask)
    v = call.v
    alpha = alpha.to(v.dtype)
    return (F.dropout(alpha, call.dropout) if call.dropout else alpha) @ v


def _blocked(call: Call) -> Tensor:
    if torch.compiler.is_exporting():
        return _dense(call)
    bias, mask = call.bias, call.mask
    if call.normalize.kernel is None or call.dropout or not call.similarity.has_dot_form:
        mask = mask if bias is None else both(mask, bias > -torch.inf)
        return recomputed(
            call.q, call.k, call.v, call.similarity, call.normalize, bias, mask, call.dropout
        )
    q, k, extra = call.similarity.dot_form(call.q, call.k)
    bias = extra if bias is None else bias if extra is None else bias + extra
    return blocked(q, k, call.v, bias, mask, call.normalize.kernel, call.normalize.exponent())


def _triton(call: Call) -> Tensor:
    return _dense(call) if torch.compiler.is_exporting() else gpu.evaluated(call)


def _associative(call: Call) -> Tensor:
    q, k, _ = call.similarity.dot_form(call.q, call.k)
    return associative(q, k, call.v, call.mask, isinstance(call.normalize, L1))


def _fused(call: Call) -> Tensor:
    (q, k, bias, scale), mask, v = inner_form(call), call.mask, call.v
    k = call.per_query_head(k)
    if isinstance(call.normalize, Softmax1):
        keys = k.shape[2]
        k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
        bias, mask = extend(bias, keys, 0.0), extend(mask, keys, True)
    elif not isinstance(call.normalize, Softmax):
        q, k = _with_potential(q * scale, k, call)
        scale = 1.0
    return fused(q, k, v, bias, mask, call.dropout, scale)


def _with_potential(q: Tensor, k: Tensor, call: Call) -> tuple[Tensor, Tensor]:
    """Append the column potential of Double or Sinkhorn, so that a softmax over the keys is all that is left."""
    bias, mask = (None if x is None else x.transpose(2, 3) for x in (call.bias, call.mask))
    column = _column(row_lse(k, q, bias, mask))
    for _ in range(getattr(call.normalize, "iterations", 1) - 1):
        row = _column(row_lse(*_append(q, k, -column), call.bias, call.mask))
        column = _column(row_lse(*_append(k, q, -row), bias, mask))
    return _append(q, k, -column)


def _column(lse: Tensor) -> Tensor:
    return lse.masked_fill(lse == -torch.inf, 0.0)


def _append(q: Tensor, k: Tensor, potential: Tensor) -> tuple[Tensor, Tensor]:
    """Add ``potential`` of every key to its scores by one more column."""
    return F.pad(q, (0, 1), value=1.0), torch.cat([k, potential.to(k.dtype)], -1)


EVALUATE = {
    "dense": _dense,
    "blocked": _blocked,
    "associative": _associative,
    "sdpa": _fused,
    "triton": _triton,
}
