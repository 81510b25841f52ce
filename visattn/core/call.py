"""One checked call of the formula."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from visattn.core.normalize.definition import Normalizer
from visattn.core.normalize.exponential import Softmax
from visattn.core.similarity.definition import Similarity
from visattn.core.similarity.product import ScaledDot

_SCALED_DOT, _SOFTMAX = ScaledDot(1), Softmax()


@dataclass(frozen=True)
class Call:
    """One checked call of the formula: masks 4-D, defaults filled in; query heads may share keys and values."""

    q: Tensor
    shared_k: Tensor
    shared_v: Tensor | None
    similarity: Similarity
    normalize: Normalizer
    bias: Tensor | None
    mask: Tensor | None
    dropout: float

    @property
    def k(self) -> Tensor:
        """The keys of every query head."""
        return self.per_query_head(self.shared_k)

    @property
    def v(self) -> Tensor | None:
        """The values of every query head."""
        return None if self.shared_v is None else self.per_query_head(self.shared_v)

    def per_query_head(self, x: Tensor) -> Tensor:
        """Copy what several query heads share to each of them."""
        group = self.q.shape[1] // max(1, x.shape[1])
        return x if group == 1 else x.repeat_interleave(group, 1)

    def key_mask_only(self) -> bool:
        return self.bias is None and (self.mask is None or self.mask.shape[2] == 1)


def check(q, k, v, similarity, normalize, bias, mask, dropout) -> Call:
    similarity = _SCALED_DOT if similarity is None else similarity
    normalize = _SOFTMAX if normalize is None else normalize
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x is not None and x.ndim != 4:
            raise ValueError(f"{name} must be (B, H, N, D); got shape {tuple(x.shape)}")
    if q.shape[0] != k.shape[0] or (v is not None and k.shape[:3] != v.shape[:3]):
        shapes = ", ".join(str(tuple(x.shape)) for x in (q, k, v) if x is not None)
        raise ValueError(
            f"q, k and v must agree in B, and k and v in heads and tokens; got {shapes}"
        )
    if (similarity.key_dim or q.shape[3]) != k.shape[3]:
        raise ValueError(
            f"k must be {similarity.key_dim or q.shape[3]} wide for {name_of(similarity)}; got {k.shape[3]}"
        )
    if k.shape[2] == 0:
        raise ValueError(f"k must have at least one token; got shape {tuple(k.shape)}")
    if q.shape[1] % k.shape[1]:
        raise ValueError(
            f"query heads must be a multiple of key heads; got {q.shape[1]} and {k.shape[1]}"
        )
    _check_parts(q.shape[1], similarity=similarity, normalize=normalize)
    _check_devices(q, k=k, v=v, bias=bias, mask=mask)
    shape = (*q.shape[:3], k.shape[2])
    bias, mask = _fit("bias", bias, shape), _fit("mask", mask, shape)
    if mask is not None and mask.dtype != torch.bool:
        raise ValueError(
            f"mask must be bool, True where a key may be attended; got {mask.dtype} (scores: bias=)"
        )
    call = Call(q, k, v, similarity, normalize, bias, mask, dropout)
    if similarity.key_local or mask is None:
        return call
    return replace(call, shared_k=_mask_keys(call.k, mask, similarity))


def _check_parts(heads: int, **parts: nn.Module) -> None:
    for name, part in parts.items():
        if part.num_heads not in (1, heads):
            raise ValueError(
                f"{name} must be made for {heads} heads, as q has, or for 1; got {part.num_heads}"
            )


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
        raise ValueError(
            f"{name} must broadcast to (B, H, Nq, Nk) = {shape}; got shape {tuple(x.shape)}"
        )
    return x.view(full) if x.ndim < 4 else x


def _mask_keys(k: Tensor, mask: Tensor, similarity: Similarity) -> Tensor:
    """Hide masked keys from a similarity that looks at all of them."""
    if mask.shape[2] != 1:
        name = type(similarity).__name__
        raise ValueError(
            f"{name} looks at all keys at once: mask must be the same for every query, (B, H, 1, Nk)"
        )
    mask = mask.transpose(2, 3)
    return k.masked_fill(~mask, -torch.inf).masked_fill(~mask.any(2, keepdim=True), 0.0)


def alpha_of(call: Call, q: Tensor, bias: Tensor | None, mask: Tensor | None) -> Tensor:
    e = call.similarity(q, call.k)
    if bias is not None:
        e, mask = e + bias, both(mask, bias > -torch.inf)
    return call.normalize(e, mask)


def inner_form(call: Call) -> tuple[Tensor, Tensor, Tensor | None, float]:
    """Return (q', k', bias, scale) with e = scale q' k'^T + bias; a plain dot product leaves k' shared."""
    similarity, bias = call.similarity, call.bias
    if type(similarity) is ScaledDot and similarity.log_temperature is None:
        return call.q, call.shared_k, bias, call.q.shape[-1] ** -0.5
    q, k, extra = similarity.dot_form(call.q, call.k)
    return q, k, extra if bias is None else bias if extra is None else bias + extra, 1.0


def both(mask: Tensor | None, other: Tensor) -> Tensor:
    return other if mask is None else mask & other


def name_of(part: nn.Module) -> str:
    return type(part).__name__
