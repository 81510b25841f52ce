"""Attention on a GPU: correctness, then against torch's fused softmax and other packages."""

import importlib.util
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from visattn.bench.gpu.machine import Machine, Work
from visattn.bench.gpu.report import Check, Measurement
from visattn.bench.timing import Timing
from visattn.core.formula import attend
from visattn.core.normalize import NORMALIZERS

HEADS = 12
HEAD_DIM = 64
TOKENS = (197, 577, 1024, 4096)
_LIMITS = {torch.float32: 1e-4, torch.bfloat16: 3e-2}
# largest ratio to SDPA that is aimed at: forward, forward and backward
_LONG = 1024  # tokens; beyond it the scores of a row are streamed
# largest ratio to SDPA that is aimed at: forward, forward and backward
_AIMS = {"sigmoid": (1.0, 1.1), "entmax15": (1.5, 1.5)}
_LONG_AIMS = {"sigmoid": (1.0, 1.1), "entmax15": (1.8, 1.8)}
# largest ratio to the packages
_PEER_AIMS = {"entmax package": 0.1, "sort-based reference": 0.1, "adasplash": 0.67}
_SDPA = "SDPA softmax"
Function = Callable[[Tensor, Tensor, Tensor], Tensor]


def inputs(machine: Machine, images: int, tokens: int, dtype: torch.dtype) -> list[Tensor]:
    """Random q, k and v, (images, HEADS, tokens, HEAD_DIM) each."""
    shape = (images, HEADS, tokens, HEAD_DIM)
    tensors = []
    for _ in range(3):
        tensor = torch.randn(shape, device=machine.device, dtype=dtype)
        tensors.append(tensor.requires_grad_())
    return tensors


def ours(name: str) -> Function:
    """``attend`` with a normalizer."""
    normalize = NORMALIZERS[name]()
    return lambda q, k, v: attend(q, k, v, None, normalize)


def checks(machine: Machine, short: int = 197, long: int = 1089) -> list[Check]:
    """Errors of output and gradients of what ``attend`` selects, for rows on chip and streamed."""
    cases = (
        (short, torch.float32),
        (short, torch.bfloat16),
        (long, torch.bfloat16),
    )
    results = []
    for name in ("sigmoid", "relu", "sparsemax", "entmax15"):
        for tokens, dtype in cases:
            tensors = inputs(machine, 1, tokens, dtype)
            error = max(_errors(NORMALIZERS[name](), tensors))
            at = f"{tokens} tokens, {dtype}, output and gradients"
            results.append(Check(name, at, error, _LIMITS[dtype]))
    return results


def _errors(normalize: torch.nn.Module, tensors: list[Tensor]) -> list[float]:
    """Relative errors of the output and the gradients of q, k and v, against float64."""
    doubles = [x.detach().double().requires_grad_() for x in tensors]
    results = _output_and_gradients(normalize, tensors, "auto")
    references = _output_and_gradients(normalize, doubles, "dense")
    errors = []
    for result, reference in zip(results, references, strict=True):
        difference = result.double() - reference
        errors.append((difference.norm() / reference.norm()).item())
    return errors


def _output_and_gradients(
    normalize: torch.nn.Module, tensors: list[Tensor], impl: str
) -> list[Tensor]:
    m = attend(*tensors, None, normalize, impl=impl)
    generator = torch.Generator().manual_seed(0)
    cotangent = torch.randn(m.shape, generator=generator).to(m)
    return [m.detach(), *torch.autograd.grad(m, tensors, cotangent)]


def rows(
    machine: Machine, tokens: tuple[int, ...] = TOKENS, at_once: int = 2**14
) -> list[Measurement]:
    """Times against SDPA's softmax and the packages, and extra memory at the longest input.

    ``at_once`` is the number of tokens of all images together.
    """
    results = []
    for count in tokens:
        tensors = inputs(machine, max(1, at_once // count), count, torch.bfloat16)
        functions = _functions(count)
        for backward in (False, True):
            work = {}
            for name, function in functions.items():
                work[name] = _bind(function, tensors, backward)
            times = machine.measure(work)
            results += _compare_times(machine, times, tensors[0].shape, backward)
    return results + _compare_memory(machine, functions, tensors)


def _functions(count: int) -> dict[str, Function]:
    functions: dict[str, Function] = {_SDPA: F.scaled_dot_product_attention}
    for name in _AIMS:
        functions[name] = ours(name)
    return functions | _peers(count)


def _bind(function: Function, tensors: list[Tensor], backward: bool) -> Work:
    run = _run_both if backward else _run_forward
    return partial(run, function, tensors)


def _run_forward(function: Function, tensors: list[Tensor]) -> None:
    with torch.no_grad():
        function(*tensors)


def _run_both(function: Function, tensors: list[Tensor]) -> None:
    m = function(*tensors)
    torch.autograd.grad(m, tensors, m.detach())


def _describe(shape: torch.Size) -> str:
    return f"{tuple(shape)}, bf16"


def _compare_times(
    machine: Machine, times: dict[str, Timing], shape: torch.Size, backward: bool
) -> list[Measurement]:
    """One round of times: ours against SDPA, and entmax15 against the packages."""
    at = _describe(shape)
    work = "forward+backward" if backward else "forward"
    floor = _floor(machine, shape, backward)
    sdpa = times[_SDPA]
    results = [Measurement(_SDPA, at, work, sdpa, floor=floor)]
    aims = _LONG_AIMS if shape[2] > _LONG else _AIMS
    for name, aim in aims.items():
        results.append(Measurement(name, at, work, times[name], _SDPA, sdpa, aim[backward], floor))
    for name, peer_aim in _PEER_AIMS.items():
        if name in times:
            results.append(
                Measurement("entmax15", at, work, times["entmax15"], name, times[name], peer_aim)
            )
    return results


def _floor(machine: Machine, shape: torch.Size, backward: bool) -> float:
    """Milliseconds for the matrix products and for moving the tensors."""
    # forward: 2 products, q k v and m; backward: 5 more, with m's gradient and three results
    products, tensors = (7, 10) if backward else (2, 4)
    images, heads, count, width = shape
    rows = images * heads * count
    flops = 2 * products * rows * count * width
    moved_bytes = 2 * tensors * rows * width
    return machine.floor(flops, moved_bytes)


def _compare_memory(
    machine: Machine, functions: dict[str, Function], tensors: list[Tensor]
) -> list[Measurement]:
    """Extra memory of forward and backward against SDPA's."""
    at = _describe(tensors[0].shape)
    spreads = {}
    for name in (_SDPA, *_AIMS):
        mib = machine.peak(_bind(functions[name], tensors, True))
        spreads[name] = Timing(mib, mib, mib)
    results = []
    for name in _AIMS:
        results.append(
            Measurement(
                name,
                at,
                "extra memory",
                spreads[name],
                against=_SDPA,
                reference=spreads[_SDPA],
                aim=1.1,
                unit="MiB",
            )
        )
    return results


def _peers(count: int) -> dict[str, Function]:
    """Packages that are installed and take the shape; without entmax, a reference by sorting."""
    peers: dict[str, Function] = {}
    if count <= _LONG:
        if importlib.util.find_spec("entmax"):
            import entmax

            peers["entmax package"] = partial(_dense, entmax.entmax15)
        else:
            peers["sort-based reference"] = partial(_dense, entmax15_by_sorting)
    is_power_of_two = count & (count - 1) == 0
    if importlib.util.find_spec("adasplash") and is_power_of_two:
        from adasplash import adasplash

        peers["adasplash"] = partial(adasplash, alpha=1.5, is_causal=False)
    return peers


def _dense(normalize: Callable, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The definition, with the N x N weights in memory."""
    e = q @ k.transpose(2, 3) * q.shape[-1] ** -0.5
    return normalize(e, -1).to(v.dtype) @ v


def entmax15_by_sorting(e: Tensor, dim: int) -> Tensor:
    """entmax15 by sorting.

    Of the thresholds that the largest k scores give, the right one has a support of k scores.
    """
    x = e.float() / 2
    ordered = x.sort(dim, descending=True).values
    count = torch.arange(1, x.shape[dim] + 1, device=x.device)
    mean = ordered.cumsum(dim) / count
    mean_square = ordered.square().cumsum(dim) / count
    spread = (1 - count * (mean_square - mean.square())) / count
    thresholds = mean - spread.clamp(min=0).sqrt()
    size = (thresholds <= ordered).sum(dim, keepdim=True)
    threshold = thresholds.gather(dim, size - 1)
    return (x - threshold).clamp(min=0).square()
