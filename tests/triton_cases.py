"""Cases of the fused GPU kernels against the float64 definition.

``python tests/triton_cases.py`` runs them under Triton's interpreter on CPU tensors and prints
their errors as JSON.
"""

import contextlib
import json
import os
import sys
from dataclasses import dataclass, field

import torch
from torch import Tensor

FLOAT, HALF, BFLOAT = torch.float32, torch.float16, torch.bfloat16
TOLERANCE = {FLOAT: 2e-5, HALF: 5e-3, BFLOAT: 3e-2}


@dataclass(frozen=True)
class Case:
    """One call: sizes are (B, H, Nq, Nk, D, Dv); ``bias`` and ``mask`` are shapes, ``streamed`` keeps rows off chip."""

    normalizer: str
    sizes: tuple[int, int, int, int, int, int] = (2, 3, 5, 37, 16, 16)
    options: dict = field(default_factory=dict)
    similarity: str = "scaled_dot"
    bias: tuple[int, ...] | None = None
    mask: tuple[int, ...] | None = None
    dtype: torch.dtype = FLOAT
    key_heads: int | None = None
    strided: bool = False
    streamed: bool = False
    minus_infinity: bool = False


LEARNED = {"alpha": 1.25}
CASES = {
    "sigmoid": Case("sigmoid", (2, 3, 19, 37, 9, 11)),
    "sigmoid_row_bias": Case("sigmoid", bias=(2, 1, 5, 1)),
    "sigmoid_no_images": Case("sigmoid", (0, 3, 5, 7, 16, 16)),
    "sigmoid_no_queries": Case("sigmoid", (2, 3, 0, 7, 16, 16)),
    "sigmoid_bfloat16": Case("sigmoid", dtype=BFLOAT, mask=(2, 1, 1, 37)),
    "relu_wide": Case("relu", (1, 2, 5, 19, 128, 40), bias=(1, 2, 1, 19), mask=(1, 1, 5, 19)),
    "relu_minus_infinity": Case("relu", bias=(5, 37), minus_infinity=True),
    "sparsemax_dead_rows": Case("sparsemax", bias=(1, 3, 5, 37), mask=(2, 1, 5, 37)),
    "sparsemax_streamed": Case("sparsemax", mask=(2, 1, 5, 37), streamed=True),
    "sparsemax_distance": Case("sparsemax", similarity="negative_l2"),
    "entmax15_two_tiles": Case("entmax15", (1, 2, 67, 71, 16, 16)),
    "entmax15_one_token": Case("entmax15", (2, 3, 1, 1, 16, 16)),
    "entmax15_one_query": Case("entmax15", (2, 3, 1, 71, 16, 16), bias=(3, 1, 71)),
    "entmax15_cosine": Case("entmax15", similarity="cosine", mask=(2, 1, 1, 37)),
    "entmax15_grouped": Case("entmax15", (1, 4, 5, 19, 16, 16), key_heads=2),
    "entmax15_grouped_values": Case(
        "entmax15", (2, 6, 5, 19, 16, 11), similarity="cosine", key_heads=3, streamed=True
    ),
    "sigmoid_grouped_columns": Case(
        "sigmoid", (2, 4, 5, 19, 16, 16), key_heads=1, bias=(1, 4, 1, 19), dtype=BFLOAT
    ),
    "entmax15_strided": Case("entmax15", strided=True, bias=(2, 1, 5, 37)),
    "entmax15_streamed": Case("entmax15", (1, 2, 5, 71, 16, 16), streamed=True, bias=(1, 1, 5, 71)),
    "entmax15_half": Case("entmax15", dtype=HALF),
    "entmax15_bfloat16": Case("entmax15", dtype=BFLOAT),
    "entmax_learned": Case("entmax", options=LEARNED, bias=(1, 3, 5, 37), mask=(2, 1, 5, 37)),
    "entmax_learned_streamed": Case("entmax", options=LEARNED, streamed=True),
    "entmax_fixed_at_sparsemax": Case(
        "entmax", options={"alpha": 2.0, "learn": False}, mask=(2, 1, 1, 37)
    ),
}
CHAINS = {
    "softmax": Case("softmax", (2, 3, 19, 37, 9, 9), mask=(2, 1, 19, 37)),
    "softmax_bias": Case("softmax", bias=(1, 3, 5, 37)),
    "entmax15": Case("entmax15", mask=(2, 1, 1, 37)),
    "sigmoid_bfloat16": Case("sigmoid", dtype=BFLOAT),
    "softmax_grouped": Case("softmax", (2, 4, 19, 37, 9, 9), key_heads=2),
    "softmax_grouped_gradient": Case("softmax", (2, 4, 19, 37, 9, 11), key_heads=2),
    "softmax_gradient": Case("softmax", (2, 3, 19, 37, 9, 11)),
}


def _random(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _tokens(case: Case, seed: int, heads: int, tokens: int, width: int) -> Tensor:
    """Return (B, H, N, D); strided ones lie as a layer's fused projection leaves them, or with every second number."""
    if not case.strided:
        return _random(seed, case.sizes[0], heads, tokens, width)
    if seed == 0:
        return _random(seed, case.sizes[0], heads, tokens, 2 * width)[..., ::2]
    return _random(seed, case.sizes[0], tokens, 3, heads, width)[:, :, 1].transpose(1, 2)


def _inputs(case: Case) -> tuple[list[Tensor], Tensor | None]:
    _, heads, queries, keys, width, value_width = case.sizes
    key_heads = case.key_heads or heads
    q, k = _tokens(case, 0, heads, queries, width), _tokens(case, 1, key_heads, keys, width)
    tensors = [q, 2 * k if not case.strided else k, _tokens(case, 2, key_heads, keys, value_width)]
    tensors = [x.to(case.dtype) for x in tensors]
    if case.bias is not None:
        bias = _random(3, *case.bias)
        tensors.append(
            bias.masked_fill(_random(5, *case.bias) > 0.5, -torch.inf)
            if case.minus_infinity
            else bias
        )
    mask = None if case.mask is None else _random(4, *case.mask) > 0
    if mask is not None and mask.shape[2] > 2:
        mask[:, :, 2] = False
    return tensors, mask


def _modules(
    case: Case, device: str, dtype: torch.dtype
) -> tuple[torch.nn.Module, torch.nn.Module]:
    from visattn.core.normalize import NORMALIZERS
    from visattn.core.similarity import SIMILARITIES

    heads, width = case.sizes[1], case.sizes[4]
    modules = (
        SIMILARITIES[case.similarity](width, heads),
        NORMALIZERS[case.normalizer](heads, **case.options),
    )
    return tuple(module.to(device, dtype) for module in modules)


def _run(case: Case, impl: str, device: str, dtype: torch.dtype) -> list[Tensor]:
    """Return the output and every gradient."""
    from visattn.core.formula import attend

    tensors, mask = _inputs(case)
    leaves = [
        x.to(device, dtype if i < 3 else torch.promote_types(dtype, FLOAT))
        for i, x in enumerate(tensors)
    ]
    leaves = [x.requires_grad_() for x in leaves]
    modules = _modules(case, device, torch.promote_types(dtype, FLOAT))
    bias, mask = (
        (leaves[3] if len(leaves) > 3 else None),
        (None if mask is None else mask.to(device)),
    )
    m = attend(*leaves[:3], *modules, bias=bias, mask=mask, impl=impl)
    wanted = leaves + [p for module in modules for p in module.parameters()]
    cotangent = _random(9, *m.shape).to(device, m.dtype)
    return [
        m.detach(),
        *torch.autograd.grad(m, wanted, cotangent, allow_unused=True, materialize_grads=True),
    ]


def _error(got: Tensor, wanted: Tensor) -> float:
    if got.shape != wanted.shape or not got.isfinite().all():
        return float("inf")
    return ((got.double() - wanted).norm() / (wanted.norm() + 1e-2)).item()


def by_kernels(case: Case, device: str) -> list[Tensor]:
    """Return output and gradients of the kernels; a streamed case keeps no row of scores on the chip."""
    from visattn.core.kernels.triton import launch

    whole, launch.ON_CHIP = launch.ON_CHIP, 0 if case.streamed else launch.ON_CHIP
    try:
        return _run(case, "triton", device, case.dtype)
    finally:
        launch.ON_CHIP = whole


def errors(case: Case, device: str) -> list[float]:
    """Return the relative error of the output and of every gradient against the definition in float64."""
    wanted = _run(case, "dense", device, torch.float64)
    return [_error(x, y) for x, y in zip(by_kernels(case, device), wanted, strict=True)]


def chain_error(case: Case, device: str, weigh: bool) -> float:
    """Return the relative error of u A, or of u [A o G]+, against the definition in float64."""
    from visattn.core.formula import attention_map
    from visattn.core.gpu import row_chain

    (q, k, v, *rest), mask = _inputs(case)
    grad = _random(7, *case.sizes[:3], case.sizes[5]).to(device, case.dtype)
    bias, mask = (rest[0].to(device) if rest else None), (None if mask is None else mask.to(device))
    q, k, v, u = (
        q.to(device),
        k.to(device),
        v.to(device),
        _random(6, case.sizes[0], case.sizes[2]).to(device),
    )
    with torch.no_grad():
        weighed = (grad, v) if weigh else None
        got = row_chain(
            u, q, k, _modules(case, device, FLOAT), bias=bias, mask=mask, weighed=weighed
        )
        modules = _modules(case, device, torch.float64)
        bias = None if bias is None else bias.double()
        alpha = attention_map(q.double(), k.double(), *modules, bias=bias, mask=mask)
        values = v.double().repeat_interleave(q.shape[1] // v.shape[1], 1)
        alpha = (alpha * (grad.double() @ values.transpose(2, 3))).clamp(min=0) if weigh else alpha
        return _error(got, (u.double()[:, None, None] @ alpha)[:, :, 0])


def _same_maps() -> dict[str, float]:
    """Return how far rollout and GAE by the kernels are from the same by tiles, as shares of their largest value."""
    from timm import create_model

    from visattn.core import gpu
    from visattn.methods.gradient import gae
    from visattn.methods.rollout import rollout
    from visattn.record.session import capture

    torch.manual_seed(0)
    model, images = create_model("test_vit", img_size=48).eval(), torch.rand(1, 3, 48, 48)
    served, plain = [], gpu.ops.row_chain

    def counted(*arguments):
        served.append(True)
        return plain(*arguments)

    def both() -> list[Tensor]:
        with torch.no_grad(), capture(model) as maps:
            model(images)
        return [rollout(maps).values, gae(model, images, 3).values]

    gpu.ops.row_chain = counted
    by_kernel = both()
    calls, gpu.unavailable = len(served), lambda device: "told so"
    by_tile = both()
    found = [
        ((x - y).abs().max() / y.abs().max()).item()
        for x, y in zip(by_kernel, by_tile, strict=True)
    ]
    return {
        "rollout": found[0],
        "gae": found[1],
        "calls": calls,
        "calls_of_tiles": len(served) - calls,
    }


def _widen_bfloat16_products() -> None:
    """Mend the interpreter, which multiplies bfloat16 as the integers that it keeps them as."""
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle, _convert_float

    plain = InterpreterBuilder.create_dot

    def widened(x: TensorHandle) -> TensorHandle:
        if x.dtype.scalar != tl.bfloat16:
            return x
        return TensorHandle(
            _convert_float(x.data, tl.bfloat16, tl.float32, None).view("float32"), tl.float32
        )

    InterpreterBuilder.create_dot = lambda self, a, b, *rest: plain(
        self, widened(a), widened(b), *rest
    )


def _compiled() -> float:
    """Return the largest difference of the compiled from the plain call: output and gradient."""
    from visattn.core.formula import Attend
    from visattn.core.normalize import NORMALIZERS

    module = Attend(None, NORMALIZERS["entmax15"](2), impl="triton")
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    results = []
    for function in (module, compiled):
        q, k, v = (_random(seed, 1, 2, 5, 16).requires_grad_() for seed in range(3))
        m = function(q, k, v)
        results.append([m, *torch.autograd.grad(m.square().sum(), (q, k, v))])
    return max((x - y).abs().max().item() for x, y in zip(*results, strict=True))


def _opcheck() -> str:
    """Hold the ops to torch's own rules: schema, fake kernels, autograd."""
    from visattn.core.kernels.triton import ops

    q, k, v = (_random(seed, 1, 2, 5, 16).requires_grad_() for seed in range(3))
    bias, mask = _random(3, 1, 1, 5, 5).requires_grad_(), torch.ones(1, 1, 1, 5, dtype=torch.bool)
    arguments = (q, k, v, bias, mask, torch.tensor([2.0, 3.0]), "entmax", 0.25)
    found = torch.library.opcheck(
        ops._forward, arguments, test_utils=("test_schema", "test_faketensor")
    )
    found |= torch.library.opcheck(ops._forward, arguments, test_utils="test_aot_dispatch_dynamic")
    chain = (
        torch.rand(1, 5),
        q.detach(),
        k.detach(),
        None,
        None,
        None,
        "softmax",
        0.25,
        None,
        None,
    )
    found |= torch.library.opcheck(
        ops.row_chain, chain, test_utils=("test_schema", "test_faketensor")
    )
    return ", ".join(sorted(set(found.values())))


def _report() -> dict:
    _widen_bfloat16_products()
    return {
        "cases": {name: errors(case, "cpu") for name, case in CASES.items()},
        "chains": {
            name: chain_error(case, "cpu", "gradient" in name) for name, case in CHAINS.items()
        },
        "compiled": _compiled(),
        "opcheck": _opcheck(),
        "maps": _same_maps(),
    }


if __name__ == "__main__":
    assert os.environ["TRITON_INTERPRET"] == "1"
    with contextlib.redirect_stdout(sys.stderr):
        report = _report()
    json.dump(report, sys.stdout)
