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
    """One call of the formula.

    ``sizes`` are (B, H, Nq, Nk, D, Dv), ``bias`` and ``mask`` shapes. ``streamed`` keeps whole rows
    of scores off the chip; with ``gradient`` a chain reads gradients and values.
    """

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
    gradient: bool = False


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
    "softmax_grouped_gradient": Case("softmax", (2, 4, 19, 37, 9, 11), key_heads=2, gradient=True),
    "softmax_gradient": Case("softmax", (2, 3, 19, 37, 9, 11), gradient=True),
}


def _random(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _tokens(case: Case, seed: int, heads: int, tokens: int, width: int) -> Tensor:
    """Return (B, H, N, D).

    Strided ones are laid out as a layer's fused projection leaves them, or skip every second
    number.
    """
    if not case.strided:
        return _random(seed, case.sizes[0], heads, tokens, width)
    if seed == 0:
        return _random(seed, case.sizes[0], heads, tokens, 2 * width)[..., ::2]
    return _random(seed, case.sizes[0], tokens, 3, heads, width)[:, :, 1].transpose(1, 2)


@dataclass
class Inputs:
    """The tensors of a case, on a CPU, before any casts but those of q, k and v to its dtype."""

    q: Tensor
    k: Tensor
    v: Tensor
    bias: Tensor | None
    mask: Tensor | None


def make_inputs(case: Case) -> Inputs:
    _, heads, queries, keys, width, value_width = case.sizes
    key_heads = case.key_heads or heads
    q = _tokens(case, 0, heads, queries, width)
    k = _tokens(case, 1, key_heads, keys, width)
    v = _tokens(case, 2, key_heads, keys, value_width)
    if not case.strided:
        k = 2 * k  # large scores: sparse weights
    q, k, v = (x.to(case.dtype) for x in (q, k, v))
    return Inputs(q, k, v, _bias(case), _mask(case))


def _bias(case: Case) -> Tensor | None:
    if case.bias is None:
        return None
    bias = _random(3, *case.bias)
    if case.minus_infinity:
        bias = bias.masked_fill(_random(5, *case.bias) > 0.5, -torch.inf)
    return bias


def _mask(case: Case) -> Tensor | None:
    if case.mask is None:
        return None
    mask = _random(4, *case.mask) > 0
    if mask.shape[2] > 2:
        mask[:, :, 2] = False  # a query without any key
    return mask


def _moved(x: Tensor | None, device: str) -> Tensor | None:
    return None if x is None else x.to(device)


def _modules(
    case: Case, device: str, dtype: torch.dtype
) -> tuple[torch.nn.Module, torch.nn.Module]:
    from visattn.core.normalize import NORMALIZERS
    from visattn.core.similarity import SIMILARITIES

    heads = case.sizes[1]
    similarity = SIMILARITIES[case.similarity](case.sizes[4], heads)
    normalizer = NORMALIZERS[case.normalizer](heads, **case.options)
    return similarity.to(device, dtype), normalizer.to(device, dtype)


def _run(case: Case, impl: str, device: str, dtype: torch.dtype) -> list[Tensor]:
    """Return the output and every gradient."""
    from visattn.core.formula import attend

    inputs = make_inputs(case)
    full_dtype = torch.promote_types(dtype, FLOAT)
    leaves = [x.to(device, dtype).requires_grad_() for x in (inputs.q, inputs.k, inputs.v)]
    bias = None
    if inputs.bias is not None:
        bias = inputs.bias.to(device, full_dtype).requires_grad_()
    modules = _modules(case, device, full_dtype)
    m = attend(*leaves, *modules, bias=bias, mask=_moved(inputs.mask, device), impl=impl)
    if bias is not None:
        leaves.append(bias)
    for module in modules:
        leaves.extend(module.parameters())
    cotangent = _random(9, *m.shape).to(device, m.dtype)
    gradients = torch.autograd.grad(m, leaves, cotangent, allow_unused=True, materialize_grads=True)
    return [m.detach(), *gradients]


def _error(actual: Tensor, expected: Tensor) -> float:
    if actual.shape != expected.shape or not actual.isfinite().all():
        return float("inf")
    difference = actual.double() - expected
    return (difference.norm() / (expected.norm() + 1e-2)).item()


def run_kernels(case: Case, device: str) -> list[Tensor]:
    """Return output and gradients of the kernels."""
    from visattn.core.kernels.triton import launch

    default = launch.ON_CHIP
    if case.streamed:
        launch.ON_CHIP = 0  # no row of scores is short enough
    try:
        return _run(case, "triton", device, case.dtype)
    finally:
        launch.ON_CHIP = default


def case_errors(case: Case, device: str) -> list[float]:
    """Return the relative errors of the output and of every gradient.

    The reference is the definition in float64.
    """
    expected = _run(case, "dense", device, torch.float64)
    actual = run_kernels(case, device)
    return [_error(x, y) for x, y in zip(actual, expected, strict=True)]


def run_chain(name: str, device: str) -> tuple[Tensor, Tensor]:
    """Return u A, or u [A o G]+, by the kernels, and by the definition in float64."""
    from visattn.core.formula import attention_map
    from visattn.core.gpu import row_chain

    case = CHAINS[name]
    inputs = make_inputs(case)
    q = inputs.q.to(device)
    k = inputs.k.to(device)
    v = inputs.v.to(device)
    bias = _moved(inputs.bias, device)
    mask = _moved(inputs.mask, device)
    u = _random(6, case.sizes[0], case.sizes[2]).to(device)
    grad = _random(7, *case.sizes[:3], case.sizes[5]).to(device, case.dtype)
    with torch.no_grad():
        weighed = (grad, v) if case.gradient else None
        modules = _modules(case, device, FLOAT)
        actual = row_chain(u, q, k, modules, bias=bias, mask=mask, weighed=weighed)
        modules = _modules(case, device, torch.float64)
        if bias is not None:
            bias = bias.double()
        alpha = attention_map(q.double(), k.double(), *modules, bias=bias, mask=mask)
        if case.gradient:
            values = v.double().repeat_interleave(q.shape[1] // v.shape[1], 1)
            alpha = (alpha * (grad.double() @ values.transpose(2, 3))).clamp(min=0)
        expected = u.double()[:, None, None] @ alpha  # (B, H, 1, Nk)
    return actual, expected[:, :, 0]


def chain_errors(name: str, device: str) -> list[float]:
    """Return the relative error of a chain, as a list like that of :func:`case_errors`."""
    return [_error(*run_chain(name, device))]


def _same_maps() -> dict[str, float]:
    """Return how far rollout and GAE by the kernels are from the same by tiles.

    The differences are relative to the largest value.
    """
    from timm import create_model

    from visattn.core import gpu
    from visattn.methods.gradient import gae
    from visattn.methods.rollout import rollout
    from visattn.record.session import capture

    torch.manual_seed(0)
    model = create_model("test_vit", img_size=48).eval()
    images = torch.rand(1, 3, 48, 48)
    row_chain = gpu.ops.row_chain
    calls = []

    def count_calls(*arguments):
        calls.append(arguments)
        return row_chain(*arguments)

    def explain() -> tuple[Tensor, Tensor]:
        with torch.no_grad(), capture(model) as maps:
            model(images)
        return rollout(maps).values, gae(model, images, 3).values

    gpu.ops.row_chain = count_calls
    kernel_rollout, kernel_gae = explain()
    kernel_calls = len(calls)
    gpu.unavailable = lambda device: "switched off"
    tile_rollout, tile_gae = explain()
    return {
        "rollout": _relative_difference(kernel_rollout, tile_rollout),
        "gae": _relative_difference(kernel_gae, tile_gae),
        "calls": kernel_calls,
        "calls_of_tiles": len(calls) - kernel_calls,
    }


def _relative_difference(actual: Tensor, expected: Tensor) -> float:
    return ((actual - expected).abs().max() / expected.abs().max()).item()


def _widen_bfloat16_products() -> None:
    """Correct the interpreter, which multiplies bfloat16 as the integers that store them."""
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle, _convert_float

    create_dot = InterpreterBuilder.create_dot

    def widen(x: TensorHandle) -> TensorHandle:
        if x.dtype.scalar != tl.bfloat16:
            return x
        data = _convert_float(x.data, tl.bfloat16, tl.float32, None).view("float32")
        return TensorHandle(data, tl.float32)

    def create_wide_dot(self, x, y, *arguments):
        return create_dot(self, widen(x), widen(y), *arguments)

    InterpreterBuilder.create_dot = create_wide_dot


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
    """Check the ops against torch's own rules: schema, fake kernels, autograd."""
    from visattn.core.kernels.triton import ops

    q, k, v = (_random(seed, 1, 2, 5, 16).requires_grad_() for seed in range(3))
    bias = _random(3, 1, 1, 5, 5).requires_grad_()
    mask = torch.ones(1, 1, 1, 5, dtype=torch.bool)
    arguments = (q, k, v, bias, mask, torch.tensor([2.0, 3.0]), "entmax", 0.25)
    nones = (None, None, None)
    chain = (torch.rand(1, 5), q.detach(), k.detach(), *nones, "softmax", 0.25, None, None)
    basic = ("test_schema", "test_faketensor")
    check = torch.library.opcheck
    results = check(ops._forward, arguments, test_utils=basic)
    results |= check(ops._forward, arguments, test_utils="test_aot_dispatch_dynamic")
    results |= check(ops.row_chain, chain, test_utils=basic)
    return ", ".join(sorted(set(results.values())))


def _report() -> dict:
    _widen_bfloat16_products()
    return {
        "cases": {name: case_errors(case, "cpu") for name, case in CASES.items()},
        "chains": {name: chain_errors(name, "cpu") for name in CHAINS},
        "compiled": _compiled(),
        "opcheck": _opcheck(),
        "maps": _same_maps(),
    }


if __name__ == "__main__":
    assert os.environ["TRITON_INTERPRET"] == "1"
    with contextlib.redirect_stdout(sys.stderr):
        report = _report()
    json.dump(report, sys.stdout)
