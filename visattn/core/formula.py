"""m = f_norm(f_sim(Q, K)) V: the definition, the plan of its evaluation, and the evaluation."""

from torch import Tensor, nn

from visattn.core.call import AttendCall, check_call, compute_weights
from visattn.core.evaluation import IMPLS, Plan, check_impl, make_plan, require, select
from visattn.core.normalize.definition import Normalizer
from visattn.core.similarity.definition import Similarity

__all__ = ["IMPLS", "Attend", "Plan", "attend", "attention_map", "plan"]


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
        impl: One of auto, sdpa, associative, blocked, triton, dense; what cannot serve the pair
            raises.

    Returns:
        (B, H, Nq, Dv).

    Raises:
        ValueError: Shapes, devices or ``impl`` do not fit.

    Example:
        >>> attend(torch.rand(2, 3, 5, 7), torch.rand(2, 3, 11, 7), torch.rand(2, 3, 11, 13)).shape
        torch.Size([2, 3, 5, 13])
    """
    call = check_call(q, k, v, similarity, normalize, bias, mask, dropout)
    evaluation = select(call) if impl == "auto" else require(call, impl)
    return evaluation.run(call)


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
        rows: Queries whose rows are wanted; None is all. Where rows do not depend on each other
            only these are formed.

    Returns:
        (B, H, rows, Nk).

    Raises:
        ValueError: Shapes or devices do not fit.

    Example:
        >>> attention_map(torch.rand(2, 3, 5, 7), torch.rand(2, 3, 11, 7), rows=[0, 4]).shape
        torch.Size([2, 3, 2, 11])
    """
    call = check_call(q, k, None, similarity, normalize, bias, mask, 0.0)
    if rows is None:
        return compute_weights(call, call.q, call.bias, call.mask)
    if not call.normalize.row_local:
        return compute_weights(call, call.q, call.bias, call.mask)[:, :, rows]
    bias = _select_rows(call.bias, rows)
    mask = _select_rows(call.mask, rows)
    return compute_weights(call, call.q[:, :, rows], bias, mask)


def _select_rows(x: Tensor | None, rows: Tensor | slice | list[int]) -> Tensor | None:
    """Select from the query axis of a bias or mask (B, H, Nq or 1, Nk)."""
    if x is None or x.shape[2] == 1:
        return x
    return x[:, :, rows]


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
    return make_plan(check_call(q, k, v, similarity, normalize, bias, mask, dropout))


class Attend(nn.Module):
    r"""The formula as a module: the seam where capture sees queries, keys and the output.

    .. math::
        m = f_{norm}(f_{sim}(q, k) + b)\, v

    Args:
        similarity: f_sim; None is ScaledDot.
        normalize: f_norm; None is Softmax.
        dropout: Share of the weights dropped in training.
        impl: As in :func:`attend`.
        dense_below: Bytes up to which ``impl="auto"`` forms and keeps the whole score matrix on a
            CPU: the faster way where heads are wide.

    Shape:
        As :func:`attend`. ``layout`` says how tokens were folded into the batch; the formula does
        not need it.

    Map:
        ``attention_map`` of the same inputs; rows sum to one where the normalizer says so.

    Raises:
        TypeError: ``similarity`` or ``normalize`` is a name; the tables SIMILARITIES and
            NORMALIZERS give objects.
        ValueError: ``dropout`` or ``impl`` is out of range.

    Reference:
        Vaswani et al. 2017, eq. 1, https://arxiv.org/abs/1706.03762. Differs from: any f_sim and
        f_norm.

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
        dense_below: int = 0,
    ):
        super().__init__()
        _check_object("similarity", similarity, "SIMILARITIES")
        _check_object("normalize", normalize, "NORMALIZERS")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must lie in [0, 1); got {dropout}")
        check_impl(impl)
        self.similarity = similarity
        self.normalize = normalize
        self.dropout = dropout
        self.impl = impl
        self.dense_below = dense_below

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        bias: Tensor | None = None,
        mask: Tensor | None = None,
        layout: object | None = None,
    ) -> Tensor:
        call = self._call(q, k, v, bias, mask)
        if self.impl == "auto":
            return select(call, self.dense_below).run(call)
        return require(call, self.impl).run(call)

    def plan(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        bias: Tensor | None = None,
        mask: Tensor | None = None,
        layout: object | None = None,
    ) -> Plan:
        """Return how ``forward`` will evaluate this call in the module's present mode, and why."""
        call = self._call(q, k, v, bias, mask)
        if self.impl == "auto":
            return make_plan(call, self.dense_below)
        return Plan(require(call, self.impl).name, f"the module was made with impl={self.impl!r}")

    def _call(
        self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, mask: Tensor | None
    ) -> AttendCall:
        dropout = self.dropout if self.training else 0.0
        return check_call(q, k, v, self.similarity, self.normalize, bias, mask, dropout)


def _check_object(argument: str, value: object, table: str) -> None:
    """Refuse a name: only configurations speak in names."""
    if value is not None and not isinstance(value, nn.Module):
        raise TypeError(f"{argument} must be an object, such as {table}[...](...); got {value!r}")
