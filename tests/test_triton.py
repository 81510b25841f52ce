"""The fused GPU kernels: right under Triton's interpreter, native where there is a GPU, and never taken in silence."""

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
from triton_cases import CASES, CHAINS, TOLERANCE, chain_error, errors

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
KERNELS = (
    "attend_streamed attend_on_chip query_grad key_grad bias_grad row_statistic chain_row".split()
)
KINDS = ("sigmoid", "relu", "sparsemax", "entmax15", "entmax")


def far(report: dict[str, list[float]], cases: dict) -> dict[str, list[float]]:
    return {
        name: found
        for name, found in report.items()
        if not max(found) < TOLERANCE[cases[name].dtype]
    }


def ran(script: str, **environment: str):
    command = [sys.executable, str(Path(__file__).with_name(script))]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@needs_triton
def test_interpreted_kernels_equal_the_definition():
    report = ran("triton_cases.py", TRITON_INTERPRET="1")
    assert report["cases"].keys() == CASES.keys() and report["chains"].keys() == CHAINS.keys()
    assert not far(report["cases"], CASES)
    assert not far({name: [error] for name, error in report["chains"].items()}, CHAINS)
    assert report["compiled"] < 1e-6
    assert report["opcheck"] == "SUCCESS"
    assert report["maps"]["rollout"] < 1e-5 and report["maps"]["gae"] < 1e-4
    assert report["maps"]["calls"] > 0 and report["maps"]["calls_of_tiles"] == 0


@needs_triton
def test_kernels_compile_for_a_gpu_that_is_not_there():
    found = ran("triton_compiled.py")
    assert {kernel["name"] for kernel in found} == set(KERNELS)
    assert all(
        kernel["shared"] <= 99 * 1024 for kernel in found
    )  # what the smallest GPUs of capability 8 have
    assert all(kernel["tensor_cores"] for kernel in found)


@pytest.mark.parametrize("name", [pytest.param(name, marks=NATIVE) for name in CASES])
def test_native_kernels_equal_the_definition(name):
    assert max(errors(CASES[name], "cuda")) < TOLERANCE[CASES[name].dtype]


@pytest.mark.parametrize("name", [pytest.param(name, marks=NATIVE) for name in CHAINS])
def test_native_row_chain_equals_the_definition(name):
    assert chain_error(CHAINS[name], "cuda", "gradient" in name) < TOLERANCE[CHAINS[name].dtype]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("tokens", [577, 2305])
def test_native_backward_repeats_bit_by_bit(tokens):
    bias = torch.randn(1, 6, tokens, tokens, device="cuda", requires_grad=True)
    leaves = [
        torch.randn(4, 6, tokens, 64, device="cuda", dtype=torch.bfloat16).requires_grad_()
        for _ in range(3)
    ]

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


@pytest.mark.parametrize("name", KINDS)
def test_cuda_takes_the_kernels(cuda_tokens, name):
    q, k, v = cuda_tokens(2, 3, 7, 16), cuda_tokens(2, 3, 11, 16), cuda_tokens(2, 3, 11, 13)
    bias = cuda_tokens(1, 3, 7, 11, dtype=torch.float32)
    chosen = plan(q, k, v, None, normalizer(name), bias=bias)
    assert chosen.impl == "triton" and "fused GPU kernel of its own" in chosen.why
    with torch.no_grad():
        m = attend(q, k, v, None, normalizer(name), bias=bias)
    assert m.shape == (2, 3, 7, 13) and m.dtype == torch.bfloat16 and m.is_cuda
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
    chosen = change(cuda_tokens, normalizer("entmax15"))
    assert chosen.impl == "blocked" and why in chosen.why


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
    found = device.unavailable(torch.device("cuda"))
    assert found is None if why is None else why in found


def test_a_gpu_without_kernels_is_told_once_and_served_by_tiles(monkeypatch):
    monkeypatch.setattr(gpu, "unavailable", lambda device: "Triton is not installed")
    with FakeTensorMode(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        gpu.__dict__.pop("__warningregistry__", None)
        q = torch.empty(1, 1, 5, 16, device="cuda")
        for _ in range(2):
            chosen = plan(q, q, q, None, NORMALIZERS["relu"]())
        plan(q, q, q)
    assert chosen.impl == "blocked" and "no fused kernel: Triton is not installed" in chosen.why
    assert [str(w.message) for w in caught] == [
        "query tiles are used in place of the fused kernels: Triton is not installed"
    ]


def test_the_cpu_says_why_without_a_warning():
    q = torch.rand(1, 1, 5, 16)
    chosen = plan(q, q, q, None, NORMALIZERS["entmax15"]())
    assert (
        chosen.impl == "blocked" and "the tensors are on cpu, the kernels run on CUDA" in chosen.why
    )
    with pytest.raises(ValueError, match="the tensors are on cpu"):
        attend(q, q, q, None, NORMALIZERS["entmax15"](), impl="triton")
    assert gpu.row_chain(torch.rand(1, 5), q, q) is None


def test_tensors_on_two_devices_are_refused():
    with FakeTensorMode():
        q, k = torch.empty(1, 1, 5, 16, device="cuda"), torch.empty(1, 1, 5, 16)
        with pytest.raises(ValueError, match=r"k must be on the device of q, cuda:0; got cpu"):
            attend(q, k, k, None, NORMALIZERS["sigmoid"]())


def test_an_exported_program_holds_no_kernel(monkeypatch):
    monkeypatch.setattr(gpu, "unavailable", lambda device: None)
    q = torch.rand(1, 2, 5, 16)
    program = torch.export.export(Attend(None, NORMALIZERS["sigmoid"](), impl="triton"), (q, q, q))
    assert "triton" not in program.graph_module.code
    expected = attend(q, q, q, None, NORMALIZERS["sigmoid"](), impl="dense")
    torch.testing.assert_close(program.module()(q, q, q), expected)
