"""The one table of evaluations: what each refuses, when it is avoided, why it is chosen, its run.

Similarities and normalizers declare what they are capable of: ``has_dot_form``, ``plain_scale`` and
``nonnegative``; ``softmax_form``, ``linear_divisor``, ``kernel`` with ``exponent()``, ``row_local``
and ``stochastic``. Nothing here asks for their types.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from visattn.core import gpu
from visattn.core.call import (
    AttendCall,
    combine_masks,
    compute_weights,
    dot_form,
    inner_form,
    name_of,
)
from visattn.core.kernels.associative import associative
from visattn.core.kernels.blocked import blocked, row_lse
from visattn.core.kernels.recompute import recomputed
from visattn.core.kernels.sdpa import extend, fused

WIDE_VALUES = 128  # channels by which values exceed keys before padding keys costs more than tiles


@dataclass(frozen=True)
class Plan:
    """How a call will be evaluated, and why; ``str`` gives one line."""

    impl: str
    why: str

    def __str__(self) -> str:
        return f"{self.impl}: {self.why}"


@dataclass(frozen=True)
class Evaluation:
    """One exact way to evaluate a call.

    Args:
        name: What ``impl=`` calls it.
        refuses: Gives the reason why it cannot serve a call, or None.
        avoids: Whether another evaluation is better for a call, although this one could serve it.
        reason: Says why it is chosen for a call.
        run: Returns m.
    """

    name: str
    refuses: Callable[[AttendCall], str | None]
    avoids: Callable[[AttendCall], bool]
    reason: Callable[[AttendCall], str]
    run: Callable[[AttendCall], Tensor]


def select(call: AttendCall, dense_below: int = 0) -> Evaluation:
    """Return the first evaluation of the table that serves a call.

    Args:
        call: The call.
        dense_below: Bytes up to which the whole score matrix is formed and kept on a CPU.
    """
    if _is_small(call, dense_below):
        return DENSE
    for evaluation in EVALUATIONS:
        if evaluation.refuses(call) is None and not evaluation.avoids(call):
            if evaluation is BLOCKED:
                gpu.warn_of_tiles(call)
            return evaluation
    return DENSE


def make_plan(call: AttendCall, dense_below: int = 0) -> Plan:
    if _is_small(call, dense_below):
        limit = f"{dense_below / 2**20:g} MiB"
        return Plan(DENSE.name, f"on a CPU a score matrix of at most {limit} is formed and kept")
    evaluation = select(call)
    return Plan(evaluation.name, evaluation.reason(call))


def require(call: AttendCall, impl: str) -> Evaluation:
    """Return the evaluation of that name, or raise with the reason why it cannot serve."""
    check_impl(impl)
    evaluation = _BY_NAME[impl]
    why = evaluation.refuses(call)
    if why is not None:
        raise ValueError(
            f"impl={impl!r} cannot serve this call: {why}; auto would take {make_plan(call)}"
        )
    return evaluation


def check_impl(impl: str) -> None:
    if impl not in IMPLS:
        raise ValueError(f"impl must be one of {', '.join(IMPLS)}; got {impl!r}")


def _is_small(call: AttendCall, limit: int) -> bool:
    if limit == 0 or not call.q.is_cpu or torch.compiler.is_compiling():
        return False
    batch, heads, queries, _ = call.q.shape
    scores = batch * heads * queries * call.shared_k.shape[2]
    return scores * call.q.element_size() <= limit


def _never(call: AttendCall) -> bool:
    return False


# associative: (K^T V) first, linear in tokens


def _associative_refuses(call: AttendCall) -> str | None:
    divisor = call.normalize.linear_divisor
    if not call.similarity.has_dot_form:
        return f"{name_of(call.similarity)} is no inner product"
    if divisor is None:
        return f"{name_of(call.normalize)} is not linear in the scores"
    if divisor == "absolute_sum" and not call.similarity.nonnegative:
        return f"the row sum of {call.pair} needs every score"
    if not call.has_key_mask_only():
        return "a bias, or a mask that differs by query, needs every score"
    if call.dropout:
        return "dropout of the weights needs every score"
    return None


def _associative_reason(call: AttendCall) -> str:
    return f"{call.pair} is a product of features: (K^T V) comes first, linear in tokens"


def _run_associative(call: AttendCall) -> Tensor:
    q, k, _ = dot_form(call)
    absolute = call.normalize.linear_divisor == "absolute_sum"
    return associative(q, k, call.v, call.mask, absolute)


# sdpa: rewritten for torch's fused kernel


def _sdpa_refuses(call: AttendCall) -> str | None:
    if not call.similarity.has_dot_form:
        return f"{name_of(call.similarity)} is no inner product"
    if call.normalize.softmax_form is None:
        return f"{name_of(call.normalize)} cannot be rewritten as a softmax"
    return None


def _sdpa_avoids(call: AttendCall) -> bool:
    if call.q.is_cuda:
        return False
    # On a CPU the fused kernel silently forms the whole matrix for dropout.
    return bool(call.dropout) or _has_wide_values(call)


def _has_wide_values(call: AttendCall) -> bool:
    """Whether the fused CPU kernel, which wants one width, loses to tiles.

    Measured for a plain softmax: keys 32, values 256 wide.
    """
    form = call.normalize.softmax_form
    if call.q.device.type != "cpu" or form is None or not form.is_plain:
        return False
    return call.shared_v is not None and call.shared_v.shape[3] > call.q.shape[3] + WIDE_VALUES


def _sdpa_reason(call: AttendCall) -> str:
    form = call.normalize.softmax_form
    is_scaled_dot = call.similarity.plain_scale(call.q.shape[-1]) == call.q.shape[-1] ** -0.5
    if is_scaled_dot and form is not None and form.is_plain:
        return "scaled_dot x softmax is what the fused kernel computes"
    return f"{call.pair} is rewritten, exactly, for the fused kernel"


def _run_sdpa(call: AttendCall) -> Tensor:
    q, k, bias, scale = inner_form(call)
    mask = call.mask
    k = call.per_query_head(k)
    v = call.v
    form = call.normalize.softmax_form
    assert form is not None, "refused otherwise"
    if form.extra_keys:
        keys = k.shape[2]
        k = F.pad(k, (0, 0, 0, form.extra_keys))
        v = F.pad(v, (0, 0, 0, form.extra_keys))
        bias = extend(bias, keys, 0.0)
        mask = extend(mask, keys, True)
    if form.column_passes:
        q, k = _with_column_potential(q * scale, k, call, form.column_passes)
        scale = 1.0
    return fused(q, k, v, bias, mask, call.dropout, scale)


def _with_column_potential(
    q: Tensor, k: Tensor, call: AttendCall, passes: int
) -> tuple[Tensor, Tensor]:
    """Append the potential that normalizes columns, so that only a softmax over keys is left."""
    bias = None if call.bias is None else call.bias.transpose(2, 3)
    mask = None if call.mask is None else call.mask.transpose(2, 3)
    column = _finite(row_lse(k, q, bias, mask))  # (B, H, Nk, 1)
    for _ in range(passes - 1):
        row = _finite(row_lse(*_append(q, k, -column), call.bias, call.mask))  # (B, H, Nq, 1)
        column = _finite(row_lse(*_append(k, q, -row), bias, mask))
    return _append(q, k, -column)


def _finite(lse: Tensor) -> Tensor:
    return lse.masked_fill(lse == -torch.inf, 0.0)


def _append(q: Tensor, k: Tensor, potential: Tensor) -> tuple[Tensor, Tensor]:
    """Add ``potential`` of every key to its scores by one more channel."""
    return F.pad(q, (0, 1), value=1.0), torch.cat([k, potential.to(k.dtype)], -1)


# triton: fused kernels on CUDA


def _triton_reason(call: AttendCall) -> str:
    return f"{call.pair} has a fused GPU kernel of its own"


def _run_triton(call: AttendCall) -> Tensor:
    return _run_dense(call) if torch.compiler.is_exporting() else gpu.evaluate(call)


# blocked: query tiles, recomputed in the backward pass


def _blocked_refuses(call: AttendCall) -> str | None:
    normalize = call.normalize
    if not normalize.row_local:
        return f"rows of {name_of(normalize)} depend on each other"
    if normalize.stochastic and normalize.training:
        return f"{name_of(normalize)} draws noise for the whole matrix"
    return None


def _blocked_reason(call: AttendCall) -> str:
    if call.dropout:
        return "the fused kernel has no dropout of the weights here: query tiles are recomputed"
    if _sdpa_refuses(call) is None and _has_wide_values(call):
        return "values are so much wider than keys that padding costs more than recomputed tiles"
    reason = f"{call.pair} goes row by row: query tiles, recomputed in the backward pass"
    has_kernel = gpu.missing_kernel(call) is None
    if has_kernel:
        reason += f" (no fused kernel: {gpu.refuses(call)})"
    return reason


def _run_blocked(call: AttendCall) -> Tensor:
    if torch.compiler.is_exporting():
        return _run_dense(call)
    normalize = call.normalize
    if normalize.kernel is None or call.dropout or not call.similarity.has_dot_form:
        mask = call.mask
        if call.bias is not None:
            mask = combine_masks(mask, call.bias > -torch.inf)
        return recomputed(
            call.q, call.k, call.v, call.similarity, normalize, call.bias, mask, call.dropout
        )
    q, k, bias = dot_form(call)
    return blocked(q, k, call.v, bias, call.mask, normalize.kernel, normalize.exponent())


# dense: the definition


def _nothing_refused(call: AttendCall) -> None:
    return None


def _dense_reason(call: AttendCall) -> str:
    if call.dropout:
        return f"dropout with {name_of(call.normalize)} needs the whole matrix"
    return f"the whole matrix is needed: {_blocked_refuses(call)}"


def _run_dense(call: AttendCall) -> Tensor:
    alpha = compute_weights(call, call.q, call.bias, call.mask)
    v = call.v
    alpha = alpha.to(v.dtype)
    if call.dropout:
        alpha = F.dropout(alpha, call.dropout)
    return alpha @ v


ASSOCIATIVE = Evaluation(
    "associative", _associative_refuses, _never, _associative_reason, _run_associative
)
SDPA = Evaluation("sdpa", _sdpa_refuses, _sdpa_avoids, _sdpa_reason, _run_sdpa)
TRITON = Evaluation("triton", gpu.refuses, _never, _triton_reason, _run_triton)
BLOCKED = Evaluation("blocked", _blocked_refuses, _never, _blocked_reason, _run_blocked)
DENSE = Evaluation("dense", _nothing_refused, _never, _dense_reason, _run_dense)

EVALUATIONS = (ASSOCIATIVE, SDPA, TRITON, BLOCKED, DENSE)
"""In the order in which ``impl="auto"`` tries them, unless ``select`` may keep a small matrix."""

_BY_NAME = {evaluation.name: evaluation for evaluation in EVALUATIONS}

IMPLS = ("auto", *_BY_NAME)
"""What ``impl=`` takes."""
