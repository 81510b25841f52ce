"""Products of a map with gates, weights and matrices, whose gradients form no temporary of the size of the map."""

from collections.abc import Sequence

import torch
from torch import Tensor

# Of a temporary that stays in the cache.
_BYTES = 2**21


def pieces(x: Tensor) -> int:
    """How many images of `x` fit into a temporary that stays in the cache."""
    return max(1, _BYTES // max(1, x[0].numel() * x.element_size()))


def plain(*tensors: Tensor) -> bool:
    """Whether torch's own operations must do: for a compiler, under autocast, away from the CPU, for halves."""
    if torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu"):
        return True
    return any(not t.is_cpu or t.dtype != tensors[0].dtype or t.dtype.itemsize < 4 for t in tensors)


class _Scaled(torch.autograd.Function):
    """A map times the product of gates, or times their sum; gradients of gates go through a temporary of few images."""

    @staticmethod
    def forward(summed: bool, x: Tensor, *gates: Tensor) -> Tensor:
        if not summed or len(gates) == 1:
            y = x * gates[0]
            for gate in gates[1:]:
                y.mul_(gate)
            return y
        total = gates[0] + gates[1]
        for gate in gates[2:]:
            total = total.add_(gate) if total.shape == x.shape else total + gate
        return total.mul_(x) if total.shape == x.shape and x.is_contiguous() else x * total

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.summed = inputs[0]
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, *gates = ctx.saved_tensors
        if torch.is_grad_enabled():  # a second derivative is wanted
            others = [[] if ctx.summed else _without(gates, k) for k in range(len(gates))]
            sums = [
                _times(gradient * x, other).sum_to_size(g.shape)
                for g, other in zip(gates, others, strict=True)
            ]
            return None, gradient * _total(gates) if ctx.summed else _times(gradient, gates), *sums
        mine, *own = ctx.needs_input_grad[1:]
        sums = _gate_gradients(gradient, x, gates, ctx.summed) if any(own) else [None] * len(gates)
        return None, _Scaled.forward(ctx.summed, gradient, *gates) if mine else None, *sums


def _without(gates: list[Tensor], k: int) -> list[Tensor]:
    return [gate for i, gate in enumerate(gates) if i != k]


def _times(x: Tensor, gates: Sequence[Tensor]) -> Tensor:
    for gate in gates:
        x = x * gate
    return x


def _total(gates: Sequence[Tensor]) -> Tensor:
    total = gates[0]
    for gate in gates[1:]:
        total = total + gate
    return total


def _gate_gradients(gradient: Tensor, x: Tensor, gates: list[Tensor], summed: bool) -> list[Tensor]:
    """For each gate the sum of gradient times x, times the other gates too unless they are summed."""
    if (
        len(gates) == 1
        and gates[0].shape[2:] == (1, 1)
        and gates[0].size(1) == x.size(1)
        and x.is_contiguous()
    ):
        return [_channel_sums(gradient, x)]
    axes = [tuple(axis for axis in range(1, x.dim()) if gate.size(axis) == 1) for gate in gates]
    totals = [torch.empty_like(gate) for gate in gates]
    count = pieces(x)
    product, other = torch.empty_like(x[:count]), torch.empty_like(x[:count])
    for g, z, *both in zip(*(t.split(count) for t in (gradient, x, *gates, *totals)), strict=True):
        now, own = both[: len(gates)], both[len(gates) :]
        whole = torch.mul(g, z, out=product[: len(z)])
        for k, total in enumerate(own):
            rest = [] if summed else _without(now, k)
            if axes[k] == (2,) and len(rest) == 1 and rest[0].shape == (*z.shape[:3], 1):
                torch.matmul(
                    rest[0].mT, whole, out=total
                )  # the sum over rows is a product with the gate of rows
                continue
            part = whole
            for gate in rest:
                part = torch.mul(part, gate, out=other[: len(z)])
            torch.sum(part, axes[k], keepdim=True, out=total)
    return totals


def _channel_sums(gradient: Tensor, x: Tensor) -> Tensor:
    """The sums of gradient times x over positions, (B, C, H, W) twice -> (B, C, 1, 1)."""
    # They are what a group norm without centering computes for its weights, in one pass and without
    # a product.
    count, area = x.size(0) * x.size(1), x.size(2) * x.size(3)
    mean, rstd = x.new_zeros(1, 1), x.new_ones(1, 1)
    backward, wanted = torch.ops.aten.native_group_norm_backward, [False, True, False]
    sums = backward(
        gradient.contiguous(), x, mean, rstd, x.new_ones(count), 1, count, area, 1, wanted
    )[1]
    return sums.view(*x.shape[:2], 1, 1)


def scaled(x: Tensor, *gates: Tensor) -> Tensor:
    """x (B, C, ...) times gates, each of size one along some axis."""
    if len(gates) == 1 and not torch.is_grad_enabled():
        return x * gates[0]
    return _Scaled.apply(False, x, *gates) if _fits(x, gates) else _times(x, gates)


def scaled_by_sum(x: Tensor, *gates: Tensor) -> Tensor:
    """x (B, C, ...) times the sum of gates, each of size one along some axis."""
    return _Scaled.apply(True, x, *gates) if _fits(x, gates) else x * _total(gates)


def _fits(x: Tensor, gates: Sequence[Tensor]) -> bool:
    """Whether each gate is one per image and smaller than the map; a replaced map may be anything."""
    alike = all(
        gate.dim() == x.dim() and gate.size(0) == x.size(0) and 1 in gate.shape[1:]
        for gate in gates
    )
    return alike and x.numel() > 0 and not plain(x, *gates)


class _Contracted(torch.autograd.Function):
    """The sum of a map times a vector along one axis; the gradient of the map is one product of two vectors."""

    @staticmethod
    def forward(x: Tensor, weights: Tensor, axis: int) -> Tensor:
        # The vector stands in front in both cases: behind, as a matrix of one column, it takes ten
        # times as long.
        return (weights[:, None] @ (x.mT if axis == 2 else x))[:, 0]

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.save_for_backward(*inputs[:2])
        ctx.axis = inputs[2]

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weights = ctx.saved_tensors
        summed_axis = ctx.axis
        remaining_axis = 3 - summed_axis
        x_gradient = None
        weights_gradient = None
        if ctx.needs_input_grad[0]:
            x_gradient = gradient.unsqueeze(summed_axis) * weights.unsqueeze(remaining_axis)
        if ctx.needs_input_grad[1]:
            weights_gradient = contracted(x, gradient, remaining_axis)
        return x_gradient, weights_gradient, None


def contracted(x: Tensor, weights: Tensor, axis: int) -> Tensor:
    """The sum of x (B, C, N) times weights over axis 1, weights (B, C), or over axis 2, weights (B, N)."""
    apply = _Contracted.forward if plain(x, weights) else _Contracted.apply
    return apply(x, weights, axis)


class _Product(torch.autograd.Function):
    """Batched matrices multiplied; gradients lie in memory as their matrices do, so that sums of them are fast."""

    @staticmethod
    def forward(a: Tensor, b: Tensor) -> Tensor:
        return a @ b

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, Tensor | None]:
        a, b = ctx.saved_tensors
        a_gradient = None
        b_gradient = None
        if ctx.needs_input_grad[0]:
            a_gradient = _product_like(a, gradient, b.mT)
        if ctx.needs_input_grad[1]:
            b_gradient = _product_like(b, a.mT, gradient)
        return a_gradient, b_gradient


def _product_like(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """The product of a and b, transposed in memory where x is."""
    is_transposed = x.stride(-1) != 1 and x.stride(-2) == 1
    if is_transposed:
        return product(b.mT, a.mT).mT
    return product(a, b)


def product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b of batched matrices (B, N, K) and (B, K, M)."""
    needs_gradient = a.requires_grad or b.requires_grad
    if plain(a, b) or not needs_gradient:
        return a @ b
    return _Product.apply(a, b)
