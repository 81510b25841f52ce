"""The fused GPU kernels: exact under Triton's interpreter, native where there is a GPU.

What selects them, and what is said where they cannot run.
"""

import importlib.util
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from triton_cases import CASES, CHAINS, TOLERANCE, case_errors, chain_errors

from visattn.core import gpu
from visattn.core.formula import Attend, attend, plan
from visattn.core.kernels.triton import device
from visattn.core.normalize import NORMALIZERS
from visattn.core.similarity import SIMILARITIES

NATIVE = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
needs_triton = pytest.mark.skipif(
    not importlib.util.find_spec("triton"), reason="Triton is not installed here"
)
FUNCTIONS = {
    "attend_streamed",
    "attend_on_chip",
    "query_grad",
    "key_grad",
    "bias_grad",
    "row_statistic",
    "chain_row",
}
SMALLEST_SHARED_BYTES = 99 * 1024  # of the GPUs of compute capability 8


def beyond_tolerance(errors: dict[str, list[float]], cases: dict) -> dict[str, list[float]]:
    """Return the cases whose largest error is too large, or no number."""
    failures = {}
    for name, values in errors.items():
        if not max(values) < TOLERANCE[cases[name].dtype]:
            failures[name] = values
    return failures


def run_script(script: str, **environment: str):
    command = [sys.executable, str(Path(__file__).with_name(script))]
    process = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout)


@needs_triton
def test_interpreted_kernels_equal_the_definition():
    report = run_script("triton_cases.py", TRITON_INTERPRET="1")
    assert report["cases"].keys() == CASES.keys()
    assert report["chains"].keys() == CHAINS.keys()
    assert not beyond_tolerance(report["cases"], CASES)
    assert not beyond_tolerance(report["chains"], CHAINS)
    assert report["compiled"] < 1e-6
    assert report["opcheck"] == "SUCCESS"
    assert report["maps"]["rollout"] < 1e-5 and report["maps"]["gae"] < 1e-4
    assert report["maps"]["calls"] > 0 and report["maps"]["calls_of_tiles"] == 0


@needs_triton
def test_kernels_compile_for_a_gpu_that_is_not_there():
    programs = run_script("triton_compiled.py")
    assert {program["name"] for program in programs} == FUNCTIONS
    assert all(program["shared"] <= SMALLEST_SHARED_BYTES for program in programs)
    assert all(program["tensor_cores"] for program in programs)


@pytest.mark.parametrize("name", [pytest.param(name, marks=NATIVE) for name in CASES])
def test_native_kernels_equal_the_definition(name):
    assert max(case_errors(CASES[name], "cuda")) < TOLERANCE[CASES[name].dtype]


@pytest.mark.parametrize("name", [pytest.param(name, marks=NATIVE) for name in CHAINS])
def test_native_row_chain_equals_the_definition(name):
    assert max(chain_errors(name, "cuda")) < TOLERANCE[CHAINS[name].dtype]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("tokens", [577, 2305])
def test_native_backward_repeats_bit_by_bit(tokens):
    bias = torch.randn(1, 6, tokens, tokens, device="cuda", requires_grad=True)
    shape = (4, 6, tokens, 64)
    leaves = []
    for _ in range(3):
        leaves.append(torch.randn(shape, device="cuda", dtype=torch.bfloat16).requires_grad_())

    def gradients():
        m = attend(*leaves, None, NORMALIZERS["entmax15"](), bias=bias, impl="triton")
        return torch.autograd.grad(m.float().square().sum(), [*leaves, bias])

    assert all(torch.equal(x, y) for x, y in zip(gradients(), gradients(), strict=True))


@pytest.fixture
def cuda_tokens(monkeypatch):
    """Fake CUDA tensors and a machine on which the kernels would run."""
    monkeypatch.setattr(gpu, "unavailable", lambda device: None)
    with FakeTensorMode():
        yield lambda *shape, dtype=torch.bfloat16: torch.empty(shape, device="cuda", dtype=dtype)


def normalizer(name):
    with torch.device("cuda"):
        return NORMALIZERS[name](3) if name == "entmax" else NORMALIZERS[name]()


def laplacian():
    with torch.device("cuda"):
        return SIMILARITIES["laplacian"](16)


@pytest.mark.parametrize("name", ["sigmoid", "relu", "sparsemax", "entmax15", "entmax"])
def test_cuda_selects_the_kernels(cuda_tokens, name):
    q = cuda_tokens(2, 3, 7, 16)
    k = cuda_tokens(2, 3, 11, 16)
    v = cuda_tokens(2, 3, 11, 13)
    bias = cuda_tokens(1, 3, 7, 11, dtype=torch.float32)
    selection = plan(q, k, v, None, normalizer(name), bias=bias)
    assert selection.impl == "triton"
    assert "fused GPU kernel of its own" in selection.why
    with torch.no_grad():
        m = attend(q, k, v, None, normalizer(name), bias=bias)
    assert m.shape == (2, 3, 7, 13)
    assert m.dtype == torch.bfloat16
    assert m.is_cuda
    assert m.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda q, n: plan(*[q(1, 1, 5, 160)] * 3, None, n), "heads up to 128 wide; got 160"),
        (lambda q, n: plan(*[q(1, 1, 5, 16, dtype=torch.float64)] * 3, None, n), "no float64"),
        (lambda q, n: plan(*[q(1, 1, 5, 16)] * 3, None, n, dropout=0.1), "dropout"),
        (lambda q, n: plan(*[q(1, 1, 5, 16)] * 3, None, NORMALIZERS["topk"]()), "query tiles"),
        (lambda q, n: plan(*[q(1, 1, 5, 16)] * 3, laplacian(), n), "query tiles"),
    ],
)
def test_what_the_kernels_do_not_serve_goes_to_tiles(cuda_tokens, change, why):
    selection = change(cuda_tokens, normalizer("entmax15"))
    assert selection.impl == "blocked" and why in selection.why


def test_softmax_stays_with_the_fused_kernel_of_torch(cuda_tokens):
    assert plan(*[cuda_tokens(1, 1, 5, 16)] * 3).impl == "sdpa"


@pytest.mark.parametrize(
    ("triton", "hip", "capability", "why"),
    [
        (False, None, (9, 0), "Triton is not installed"),
        (True, None, (7, 5), "compute capability 7.5 is below 8.0"),
        (True, "6.4", (9, 4), "ROCm"),
        (True, None, (8, 0), None),
        (True, None, (12, 0), None),
    ],
)
def test_what_a_machine_lacks_is_named(monkeypatch, triton, hip, capability, why):
    monkeypatch.setattr(device.importlib.util, "find_spec", lambda name: triton or None)
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    reason = device.unavailable(torch.device("cuda"))
    if why is None:
        assert reason is None
    else:
        assert why in reason


def test_a_gpu_without_kernels_warns_once_and_is_served_by_tiles(monkeypatch):
    monkeypatch.setattr(gpu, "unavailable", lambda device: "Triton is not installed")
    with FakeTensorMode(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        gpu.__dict__.pop("__warningregistry__", None)
        q = torch.empty(1, 1, 5, 16, device="cuda")
        for _ in range(2):
            selection = plan(q, q, q, None, NORMALIZERS["relu"]())
        plan(q, q, q)
    assert (
        selection.impl == "blocked" and "no fused kernel: Triton is not installed" in selection.why
    )
    assert [str(w.message) for w in caught] == [
        "query tiles are used in place of the fused kernels: Triton is not installed"
    ]


def test_the_cpu_says_why_without_a_warning():
    q = torch.rand(1, 1, 5, 16)
    selection = plan(q, q, q, None, NORMALIZERS["entmax15"]())
    assert selection.impl == "blocked"
    assert "the tensors are on cpu, the kernels run on CUDA" in selection.why
    with pytest.raises(ValueError, match="the tensors are on cpu"):
        attend(q, q, q, None, NORMALIZERS["entmax15"](), impl="triton")
    assert gpu.row_chain(torch.rand(1, 5), q, q) is None


def test_tensors_on_two_devices_are_refused():
    with FakeTensorMode():
        q = torch.empty(1, 1, 5, 16, device="cuda")
        k = torch.empty(1, 1, 5, 16)
        with pytest.raises(ValueError, match=r"k must be on the device of q, cuda:0; got cpu"):
            attend(q, k, k, None, NORMALIZERS["sigmoid"]())


def test_an_exported_program_holds_no_kernel(monkeypatch):
    monkeypatch.setattr(gpu, "unavailable", lambda device: None)
    q = torch.rand(1, 2, 5, 16)
    program = torch.export.export(Attend(None, NORMALIZERS["sigmoid"](), impl="triton"), (q, q, q))
    assert "triton" not in program.graph_module.code
    expected = attend(q, q, q, None, NORMALIZERS["sigmoid"](), impl="dense")
    torch.testing.assert_close(program.module()(q, q, q), expected)
