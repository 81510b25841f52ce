"""One checked call of the formula."""

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from visattn.core.normalize.definition import Normalizer
from visattn.core.normalize.exponential import Softmax
from visattn.core.similarity.definition import Similarity
from visattn.core.similarity.product import ScaledDot

DEFAULT_SIMILARITY = ScaledDot(1)  # without parameters, so its head_dim has no effect
DEFAULT_NORMALIZER = Softmax()

Shape4 = tuple[int, int, int, int]


@dataclass(frozen=True)
class AttendCall:
    """One checked call: masks 4-D, defaults filled in; query heads may share keys and values."""

    q: Tensor  # (B, H, Nq, D)
    shared_k: Tensor  # (B, Hk, Nk, D), where H is a multiple of Hk
    shared_v: Tensor | None  # (B, Hk, Nk, Dv)
    similarity: Similarity
    normalize: Normalizer
    bias: Tensor | None
    mask: Tensor | None
    dropout: float

    @property
    def k(self) -> Tensor:
        """The keys of every query head: (B, H, Nk, D)."""
        return self.per_query_head(self.shared_k)

    @property
    def v(self) -> Tensor:
        """The values of every query head: (B, H, Nk, Dv)."""
        assert self.shared_v is not None, "a map has no values"
        return self.per_query_head(self.shared_v)

    @property
    def pair(self) -> str:
        return f"{name_of(self.similarity)} x {name_of(self.normalize)}"

    def per_query_head(self, x: Tensor) -> Tensor:
        """Copy what several query heads share to each of them."""
        group = self.q.shape[1] // max(1, x.shape[1])
        return x if group == 1 else x.repeat_interleave(group, 1)

    def has_key_mask_only(self) -> bool:
        """Whether all queries of an image and head may attend the same keys, without a bias."""
        return self.bias is None and (self.mask is None or self.mask.shape[2] == 1)


class InnerForm(NamedTuple):
    """Scores as e = scale q k^T + bias; keys are still shared where ``k`` is the call's own."""

    q: Tensor
    k: Tensor
    bias: Tensor | None
    scale: float


def check_call(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    similarity: Similarity | None,
    normalize: Normalizer | None,
    bias: Tensor | None,
    mask: Tensor | None,
    dropout: float,
) -> AttendCall:
    """Fill in defaults and refuse what does not fit together."""
    similarity = DEFAULT_SIMILARITY if similarity is None else similarity
    normalize = DEFAULT_NORMALIZER if normalize is None else normalize
    _check_shapes(q, k, v, similarity)
    _check_heads(q.shape[1], "similarity", similarity.num_heads)
    _check_heads(q.shape[1], "normalize", normalize.num_heads)
    _check_devices(q, k=k, v=v, bias=bias, mask=mask)
    shape = (q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    bias = _as_4d("bias", bias, shape)
    mask = _as_4d("mask", mask, shape)
    if mask is not None and mask.dtype != torch.bool:
        raise ValueError(
            f"mask must be bool, True where a key may be attended; got {mask.dtype} (scores: bias=)"
        )
    call = AttendCall(q, k, v, similarity, normalize, bias, mask, dropout)
    if similarity.key_local or mask is None:
        return call
    return replace(call, shared_k=_hide_masked_keys(call.k, mask, similarity))


def _check_shapes(q: Tensor, k: Tensor, v: Tensor | None, similarity: Similarity) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x is not None and x.ndim != 4:
            raise ValueError(f"{name} must be (B, H, N, D); got shape {tuple(x.shape)}")
    if q.shape[0] != k.shape[0] or (v is not None and k.shape[:3] != v.shape[:3]):
        shapes = ", ".join(str(tuple(x.shape)) for x in (q, k, v) if x is not None)
        raise ValueError(
            f"q, k and v must agree in B, and k and v in heads and tokens; got {shapes}"
        )
    key_dim = similarity.key_dim or q.shape[3]
    if key_dim != k.shape[3]:
        raise ValueError(f"k must be {key_dim} wide for {name_of(similarity)}; got {k.shape[3]}")
    if k.shape[2] == 0:
        raise ValueError(f"k must have at least one token; got shape {tuple(k.shape)}")
    if q.shape[1] % k.shape[1]:
        raise ValueError(
            f"query heads must be a multiple of key heads; got {q.shape[1]} and {k.shape[1]}"
        )


def _check_heads(heads: int, name: str, num_heads: int) -> None:
    if num_heads not in (1, heads):
        raise ValueError(
            f"{name} must be made for {heads} heads, as q has, or for 1; got {num_heads}"
        )


def _check_devices(q: Tensor, **others: Tensor | None) -> None:
    for name, x in others.items():
        if x is not None and x.device != q.device:
            raise ValueError(f"{name} must be on the device of q, {q.device}; got {x.device}")


def _as_4d(name: str, x: Tensor | None, shape: Shape4) -> Tensor | None:
    """Make a bias or mask 4-D, as the fused kernel needs it."""
    if x is None:
        return None
    sizes = (1,) * (4 - x.ndim) + tuple(x.shape)
    fits = len(sizes) == 4
    for size, full_size in zip(sizes, shape, strict=False):
        fits = fits and size in (1, full_size)
    if not fits:
        raise ValueError(
            f"{name} must broadcast to (B, H, Nq, Nk) = {shape}; got shape {tuple(x.shape)}"
        )
    return x.view(sizes) if x.ndim < 4 else x


def _hide_masked_keys(k: Tensor, mask: Tensor, similarity: Similarity) -> Tensor:
    """Hide masked keys from a similarity that looks at all of them."""
    if mask.shape[2] != 1:
        raise ValueError(
            f"{name_of(similarity)} looks at all keys at once: mask must be the same for every "
            "query, (B, H, 1, Nk)"
        )
    may_attend = mask.transpose(2, 3)  # (B, H, Nk, 1)
    k = k.masked_fill(~may_attend, -torch.inf)
    # Where every key is masked, infinities would give NaN.
    return k.masked_fill(~may_attend.any(2, keepdim=True), 0.0)


def compute_weights(
    call: AttendCall, q: Tensor, bias: Tensor | None, mask: Tensor | None
) -> Tensor:
    """Evaluate the definition for some query rows: (B, H, rows, Nk)."""
    e = call.similarity(q, call.k)
    if bias is not None:
        e = e + bias
        mask = combine_masks(mask, bias > -torch.inf)
    return call.normalize(e, mask)


def inner_form(call: AttendCall) -> InnerForm:
    """Write the scores as a scaled inner product; a plain one leaves shared keys shared."""
    scale = call.similarity.plain_scale(call.q.shape[-1])
    if scale is not None:
        return InnerForm(call.q, call.shared_k, call.bias, scale)
    q, k, bias = dot_form(call)
    return InnerForm(q, k, bias, 1.0)


def dot_form(call: AttendCall) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return (q', k', bias) with e + bias = q' k'^T + bias, of a similarity that has a dot form."""
    form = call.similarity.dot_form(call.q, call.k)
    assert form is not None, "has_dot_form promised one"
    q, k, extra = form
    if call.bias is None:
        return q, k, extra
    if extra is None:
        return q, k, call.bias
    return q, k, call.bias + extra


def combine_masks(mask: Tensor | None, other: Tensor) -> Tensor:
    return other if mask is None else mask & other


def name_of(module: nn.Module) -> str:
    return type(module).__name__
