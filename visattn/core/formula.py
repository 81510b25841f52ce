"""m = f_norm(f_sim(Q, K)) V: the definition, the plan of its evaluation, and the evaluation."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visattn.core.kernels.associative import associative
from visattn.core.kernels.blocked import blocked, row_lse
from visattn.core.kernels.recompute import recomputed, rows_of
from visattn.core.kernels.sdpa import extend, fused
from visattn.core.normalize.definition import Normalizer
from visattn.core.normalize.doubly import Double, Sinkhorn
from visattn.core.normalize.exponential import Softmax, Softmax1
from visattn.core.normalize.linear import L1, Uniform
from visattn.core.similarity.definition import Similarity
from visattn.core.similarity.product import ScaledDot

IMPLS = ("auto", "sdpa", "associative", "blocked", "triton", "dense")
_SCALED_DOT, _SOFTMAX = ScaledDot(1), Softmax()


@dataclass(frozen=True)
class Plan:
    """How a pair will be evaluated, and why; ``str`` gives one line."""

    impl: str
    why: str

    def __str__(self) -> str:
        return f"{self.impl}: {self.why}"


@dataclass(frozen=True)
class _Call:
    """One checked call of the formula: heads matched, masks 4-D, defaults filled in."""

    q: Tensor
    k: Tensor
    v: Tensor | None
    similarity: Similarity
    normalize: Normalizer
    bias: Tensor | None
    mask: Tensor | None
    dropout: float

    def has_dot_form(self) -> bool:
        return type(self.similarity).dot_form is not Similarity.dot_form

    def key_mask_only(self) -> bool:
        return self.bias is None and (self.mask is None or self.mask.shape[2] == 1)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    similarity: Similarity | None = None,
    normalize: Normalizer | None = None,
    *,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    dropout: float = 0.0,
    impl: str = "auto",
) -> Tensor:
    r"""Return m = f_norm(f_sim(q, k) + bias) v.

    Args:
        q: (B, H, Nq, D).
        k: (B, Hk, Nk, D); H is a multiple of Hk, and groups of query heads share a key head.
        v: (B, Hk, Nk, Dv).
        similarity: f_sim; None is ScaledDot.
        normalize: f_norm; None is Softmax.
        bias: Float, added to the scores, broadcastable to (B, H, Nq, Nk); -inf masks.
        mask: Bool, broadcastable likewise; True may attend. A query without any key gets zeros.
        dropout: Share of the weights dropped; the caller passes 0 in evaluation.
        impl: One of auto, sdpa, associative, blocked, triton, dense; what cannot serve the pair raises.

    Returns:
        (B, H, Nq, Dv).

    Raises:
        ValueError: Shapes, devices or ``impl`` do not fit.

    Example:
        >>> attend(torch.rand(2, 3, 5, 7), torch.rand(2, 3, 11, 7), torch.rand(2, 3, 11, 13)).shape
        torch.Size([2, 3, 5, 13])
    """
    call = _check(q, k, v, similarity, normalize, bias, mask, dropout)
    if impl == "auto":
        impl = _plan(call).impl
    else:
        _require(call, impl)
    return _EVALUATE[impl](call)


def attention_map(
    q: Tensor,
    k: Tensor,
    similarity: Similarity | None = None,
    normalize: Normalizer | None = None,
    *,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    rows: Tensor | slice | list[int] | None = None,
) -> Tensor:
    r"""Return the map :math:`\alpha = f_{norm}(f_{sim}(q, k) + bias)`: the definition.

    Args:
        q: (B, H, Nq, D).
        k: (B, Hk, Nk, D).
        similarity: f_sim; None is ScaledDot.
        normalize: f_norm; None is Softmax.
        bias: As in :func:`attend`.
        mask: As in :func:`attend`.
        rows: Queries whose rows are wanted; None is all. Where rows do not depend on each other only these are formed.

    Returns:
        (B, H, rows, Nk).

    Raises:
        ValueError: Shapes or devices do not fit.

    Example:
        >>> attention_map(torch.rand(2, 3, 5, 7), torch.rand(2, 3, 11, 7), rows=[0, 4]).shape
        torch.Size([2, 3, 2, 11])
    """
    call = _check(q, k, None, similarity, normalize, bias, mask, 0.0)
    if rows is None:
        return _alpha(call, call.q, call.bias, call.mask)
    if not call.normalize.row_local:
        return _alpha(call, call.q, call.bias, call.mask)[:, :, rows]
    return _alpha(call, call.q[:, :, rows], rows_of(call.bias, rows), rows_of(call.mask, rows))


def plan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    similarity: Similarity | None = None,
    normalize: Normalizer | None = None,
    *,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    dropout: float = 0.0,
) -> Plan:
    """Return how :func:`attend` will evaluate this call, and why.

    Example:
        >>> x = torch.rand(1, 1, 5, 7)
        >>> print(plan(x, x, x))
        sdpa: scaled_dot x softmax is what the fused kernel computes
    """
    return _plan(_check(q, k, v, similarity, normalize, bias, mask, dropout))


class Attend(nn.Module):
    r"""The formula as a module: the seam where capture sees queries, keys and the output.

    .. math::
        m = f_{norm}(f_{sim}(q, k) + b)\, v

    Args:
        similarity: f_sim; None is ScaledDot.
        normalize: f_norm; None is Softmax.
        dropout: Share of the weights dropped in training.
        impl: As in :func:`attend`.

    Shape:
        As :func:`attend`. ``layout`` says how tokens were folded into the batch; the formula does not need it.

    Map:
        ``attention_map`` of the same inputs; rows sum to one where the normalizer says so.

    Raises:
        TypeError: ``similarity`` or ``normalize`` is a name; the tables SIMILARITIES and NORMALIZERS give objects.
        ValueError: ``dropout`` or ``impl`` is out of range.

    Reference:
        Vaswani et al. 2017, eq. 1, https://arxiv.org/abs/1706.03762. Differs from: any f_sim and f_norm.

    Example:
        >>> x = torch.rand(2, 3, 5, 7)
        >>> Attend()(x, x, x).shape
        torch.Size([2, 3, 5, 7])
    """

    def __init__(
        self,
        similarity: Similarity | None = None,
        normalize: Normalizer | None = None,
        *,
        dropout: float = 0.0,
        impl: str = "auto",
    ):
        super().__init__()
        for argument, value, table in (
            ("similarity", similarity, "SIMILARITIES"),
            ("normalize", normalize, "NORMALIZERS"),
        ):
            if value is not None and not isinstance(value, nn.Module):
                raise TypeError(f"{argument} must be an object, such as {table}[...](...); got {value!r}")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must lie in [0, 1); got {dropout}")
        if impl not in IMPLS:
            raise ValueError(f"impl must be one of {', '.join(IMPLS)}; got {impl!r}")
        self.similarity, self.normalize = similarity, normalize
        self.dropout, self.impl = dropout, impl

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        bias: Tensor | None = None,
        mask: Tensor | None = None,
        layout: object | None = None,
    ) -> Tensor:
        dropout = self.dropout if self.training else 0.0
        return attend(q, k, v, self.similarity, self.normalize, bias=bias, mask=mask, dropout=dropout, impl=self.impl)


def _check(q, k, v, similarity, normalize, bias, mask, dropout) -> _Call:
    similarity = _SCALED_DOT if similarity is None else similarity
    normalize = _SOFTMAX if normalize is None else normalize
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x is not None and x.ndim != 4:
            raise ValueError(f"{name} must be (B, H, N, D); got shape {tuple(x.shape)}")
    if q.shape[0] != k.shape[0] or (v is not None and k.shape[:3] != v.shape[:3]):
        shapes = ", ".join(str(tuple(x.shape)) for x in (q, k, v) if x is not None)
        raise ValueError(f"q, k and v must agree in B, and k and v in heads and tokens; got {shapes}")
    if (similarity.key_dim or q.shape[3]) != k.shape[3]:
        raise ValueError(f"k must be {similarity.key_dim or q.shape[3]} wide for {_name(similarity)}; got {k.shape[3]}")
    if k.shape[2] == 0:
        raise ValueError(f"k must have at least one token; got shape {tuple(k.shape)}")
    if q.shape[1] % k.shape[1]:
        raise ValueError(f"query heads must be a multiple of key heads; got {q.shape[1]} and {k.shape[1]}")
    _check_devices(q, k=k, v=v, bias=bias, mask=mask)
    if q.shape[1] != k.shape[1]:
        group = q.shape[1] // k.shape[1]
        k = k.repeat_interleave(group, 1)
        v = v if v is None else v.repeat_interleave(group, 1)
    shape = (*q.shape[:3], k.shape[2])
    bias, mask = _fit("bias", bias, shape), _fit("mask", mask, shape)
    if mask is not None and mask.dtype != torch.bool:
        raise ValueError(f"mask must be bool, True where a key may be attended; got {mask.dtype} (scores: bias=)")
    if not similarity.key_local:
        k = _mask_keys(k, mask, similarity)
    return _Call(q, k, v, similarity, normalize, bias, mask, dropout)


def _check_devices(q: Tensor, **others: Tensor | None) -> None:
    for name, x in others.items():
        if x is not None and x.device != q.device:
            raise ValueError(f"{name} must be on the device of q, {q.device}; got {x.device}")


def _fit(name: str, x: Tensor | None, shape: tuple[int, int, int, int]) -> Tensor | None:
    """Make a bias or mask 4-D, as the fused kernel needs it."""
    if x is None:
        return None
    full = (1,) * (4 - x.ndim) + tuple(x.shape)
    if len(full) != 4 or any(have not in (1, want) for have, want in zip(full, shape, strict=True)):
        raise ValueError(f"{name} must broadcast to (B, H, Nq, Nk) = {shape}; got shape {tuple(x.shape)}")
    return x.view(full) if x.ndim < 4 else x


def _mask_keys(k: Tensor, mask: Tensor | None, similarity: Similarity) -> Tensor:
    """Hide masked keys from a similarity that looks at all of them."""
    if mask is None:
        return k
    if mask.shape[2] != 1:
        name = type(similarity).__name__
        raise ValueError(f"{name} looks at all keys at once: mask must be the same for every query, (B, H, 1, Nk)")
    mask = mask.transpose(2, 3)
    return k.masked_fill(~mask, -torch.inf).masked_fill(~mask.any(2, keepdim=True), 0.0)


def _alpha(call: _Call, q: Tensor, bias: Tensor | None, mask: Tensor | None) -> Tensor:
    e = call.similarity(q, call.k)
    if bias is not None:
        e, mask = e + bias, _and(mask, bias > -torch.inf)
    return call.normalize(e, mask)


def _and(mask: Tensor | None, other: Tensor) -> Tensor:
    return other if mask is None else mask & other


def _name(part: nn.Module) -> str:
    return type(part).__name__


def _plan(call: _Call) -> Plan:
    """Choose the first evaluation that serves the call exactly and without an N x N matrix."""
    if call.dropout and not (call.q.is_cuda and _refuses(call, "sdpa") is None):
        if call.normalize.row_local and not call.normalize.stochastic:
            return Plan("blocked", "dropout of the weights leaves the fused kernel, so tiles are formed again")
        return Plan("dense", f"dropout with {_name(call.normalize)} needs the whole matrix")
    for impl in ("associative", "sdpa", "blocked"):
        if _refuses(call, impl) is None:
            return Plan(impl, _reason(call, impl))
    return Plan("dense", f"the whole matrix is needed: {_refuses(call, 'blocked')}")


def _reason(call: _Call, impl: str) -> str:
    pair = f"{_name(call.similarity)} x {_name(call.normalize)}"
    if impl == "associative":
        return f"{pair} is a product of features: (K^T V) comes first, linear in tokens"
    if impl == "blocked":
        return f"{pair} goes row by row: query tiles, formed again in the backward pass"
    if call.similarity is _SCALED_DOT and call.normalize is _SOFTMAX:
        return "scaled_dot x softmax is what the fused kernel computes"
    return f"{pair} is rewritten, exactly, for the fused kernel"


def _refuses(call: _Call, impl: str) -> str | None:
    """Return why an evaluation cannot serve the call; None where it can."""
    pair = f"{_name(call.similarity)} x {_name(call.normalize)}"
    normalize = call.normalize
    if impl == "dense":
        return None
    if impl == "triton":
        return f"there is no fused GPU kernel for {pair}"
    if impl == "blocked":
        if not normalize.row_local:
            return f"rows of {_name(normalize)} depend on each other"
        if normalize.stochastic and normalize.training:
            return f"{_name(normalize)} draws noise for the whole matrix"
        return None
    if not call.has_dot_form():
        return f"{_name(call.similarity)} is no inner product"
    if impl == "sdpa":
        fits = isinstance(normalize, Softmax | Softmax1 | Double | Sinkhorn)
        return None if fits else f"{_name(normalize)} cannot be rewritten as a softmax"
    if not isinstance(normalize, L1 | Uniform):
        return f"{_name(normalize)} is not linear in the scores"
    if isinstance(normalize, L1) and not call.similarity.nonnegative:
        return f"the row sum of {pair} needs every score"
    return None if call.key_mask_only() else "a bias, or a mask that differs by query, needs every score"


def _require(call: _Call, impl: str) -> None:
    if impl not in IMPLS:
        raise ValueError(f"impl must be one of {', '.join(IMPLS)}; got {impl!r}")
    why = _refuses(call, impl)
    if why is None and call.dropout and impl == "associative":
        why = "dropout of the weights needs every score"
    if why is not None:
        raise ValueError(f"impl={impl!r} cannot serve this call: {why}; auto would take {_plan(call)}")


def _dense(call: _Call) -> Tensor:
    alpha = _alpha(call, call.q, call.bias, call.mask)
    alpha = alpha.to(call.v.dtype)
    return (F.dropout(alpha, call.dropout) if call.dropout else alpha) @ call.v


def _blocked(call: _Call) -> Tensor:
    if torch.compiler.is_exporting():
        return _dense(call)
    bias, mask = call.bias, call.mask
    if call.normalize.kernel is None or call.dropout or not call.has_dot_form():
        mask = mask if bias is None else _and(mask, bias > -torch.inf)
        return recomputed(call.q, call.k, call.v, call.similarity, call.normalize, bias, mask, call.dropout)
    q, k, extra = call.similarity.dot_form(call.q, call.k)
    bias = extra if bias is None else bias if extra is None else bias + extra
    return blocked(q, k, call.v, bias, mask, call.normalize.kernel, call.normalize.exponent())


def _associative(call: _Call) -> Tensor:
    q, k, _ = call.similarity.dot_form(call.q, call.k)
    return associative(q, k, call.v, call.mask, isinstance(call.normalize, L1))


def _fused(call: _Call) -> Tensor:
    similarity, bias, mask, v = call.similarity, call.bias, call.mask, call.v
    if type(similarity) is ScaledDot and similarity.log_temperature is None:
        q, k, scale = call.q, call.k, call.q.shape[-1] ** -0.5
    else:
        (q, k, extra), scale = similarity.dot_form(call.q, call.k), 1.0
        bias = extra if bias is None else bias if extra is None else bias + extra
    if isinstance(call.normalize, Softmax1):
        keys = k.shape[2]
        k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
        bias, mask = extend(bias, keys, 0.0), extend(mask, keys, True)
    elif not isinstance(call.normalize, Softmax):
        q, k = _with_potential(q * scale, k, call)
        scale = 1.0
    return fused(q, k, v, bias, mask, call.dropout, scale)


def _with_potential(q: Tensor, k: Tensor, call: _Call) -> tuple[Tensor, Tensor]:
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


_EVALUATE = {"dense": _dense, "blocked": _blocked, "associative": _associative, "sdpa": _fused}
