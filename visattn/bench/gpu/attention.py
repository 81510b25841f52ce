"""Attention on a GPU: right first, then against torch's fused softmax and what else is installed."""

import importlib.util
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from visattn.bench.gpu.machine import Machine, Work
from visattn.bench.gpu.report import Check, Row
from visattn.bench.timing import Timing
from visattn.core.formula import attend
from visattn.core.normalize import NORMALIZERS

HEADS, HEAD_DIM = 12, 64
TOKENS = (197, 577, 1024, 4096)
_LIMITS = {torch.float32: 1e-4, torch.bfloat16: 3e-2}
_AIMS = {"sigmoid": (1.0, 1.1), "entmax15": (1.5, 1.5)}
_LONG_AIMS = {"sigmoid": (1.0, 1.1), "entmax15": (1.8, 1.8)}
Function = Callable[[Tensor, Tensor, Tensor], Tensor]


def inputs(machine: Machine, images: int, tokens: int, dtype: torch.dtype) -> list[Tensor]:
    shape = (images, HEADS, tokens, HEAD_DIM)
    return [
        torch.randn(shape, device=machine.device, dtype=dtype).requires_grad_() for _ in range(3)
    ]


def ours(name: str) -> Function:
    normalize = NORMALIZERS[name]()
    return lambda q, k, v: attend(q, k, v, None, normalize)


def checks(machine: Machine, short: int = 197, long: int = 1089) -> list[Check]:
    """Return the errors of output and gradients of what ``attend`` chooses here, for rows on chip and streamed."""
    found = []
    for name in ("sigmoid", "relu", "sparsemax", "entmax15"):
        for count, dtype in (
            (short, torch.float32),
            (short, torch.bfloat16),
            (long, torch.bfloat16),
        ):
            error = max(_errors(NORMALIZERS[name](), inputs(machine, 1, count, dtype)))
            found.append(
                Check(name, f"{count} tokens, {dtype}, output and gradients", error, _LIMITS[dtype])
            )
    return found


def _errors(normalize: torch.nn.Module, tensors: list[Tensor]) -> list[float]:
    wide = [x.detach().double().requires_grad_() for x in tensors]
    results = []
    for leaves, impl in ((tensors, "auto"), (wide, "dense")):
        m = attend(*leaves, None, normalize, impl=impl)
        cotangent = torch.randn(m.shape, generator=torch.Generator().manual_seed(0)).to(m)
        results.append([m.detach(), *torch.autograd.grad(m, leaves, cotangent)])
    return [((x.double() - y).norm() / y.norm()).item() for x, y in zip(*results, strict=True)]


def rows(machine: Machine, tokens: tuple[int, ...] = TOKENS, at_once: int = 2**14) -> list[Row]:
    """Return times against SDPA's softmax and the packages, and extra memory at the longest."""
    found = []
    for count in tokens:
        tensors = inputs(machine, max(1, at_once // count), count, torch.bfloat16)
        at = f"{tuple(tensors[0].shape)}, bf16"
        functions = {"SDPA softmax": F.scaled_dot_product_attention} | {
            name: ours(name) for name in _AIMS
        }
        functions |= _peers(count)
        for backward in (False, True):
            work = {
                name: _bound(function, tensors, backward) for name, function in functions.items()
            }
            found += _compared(machine, machine.measure(work), at, tensors[0].shape, backward)
    memory = {
        name: machine.peak(_bound(functions[name], tensors, True))
        for name in ("SDPA softmax", *_AIMS)
    }
    base = memory.pop("SDPA softmax")
    for name, mib in memory.items():
        spread, reference = Timing(mib, mib, mib), Timing(base, base, base)
        found.append(
            Row(name, at, "extra memory", spread, "SDPA softmax", reference, 1.1, unit="MiB")
        )
    return found


def _bound(function: Function, tensors: list[Tensor], backward: bool) -> Work:
    return partial(_both if backward else _forward, function, tensors)


def _forward(function: Function, tensors: list[Tensor]) -> None:
    with torch.no_grad():
        function(*tensors)


def _both(function: Function, tensors: list[Tensor]) -> None:
    m = function(*tensors)
    torch.autograd.grad(m, tensors, m.detach())


def _compared(
    machine: Machine, times: dict[str, Timing], at: str, shape: torch.Size, backward: bool
) -> list[Row]:
    """Turn one round of times into rows: ours against SDPA, and entmax15 against the packages."""
    images, heads, count, width = shape
    products, tensors = (7, 10) if backward else (2, 4)
    pairs = images * heads * count
    floor = machine.floor(2 * products * pairs * count * width, 2 * tensors * pairs * width)
    aims = _LONG_AIMS if count > 1024 else _AIMS
    work = "forward+backward" if backward else "forward"
    sdpa = times["SDPA softmax"]
    found = [Row("SDPA softmax", at, work, sdpa, floor=floor)]
    for name, aim in aims.items():
        found.append(Row(name, at, work, times[name], "SDPA softmax", sdpa, aim[backward], floor))
    for name, aim in (
        ("entmax package", 0.1),
        ("sort-based reference", 0.1),
        ("adasplash", 1 / 1.5),
    ):
        if name in times:
            found.append(
                Row("entmax15", at, work, times["entmax15"], name, times[name], round(aim, 2))
            )
    return found


def _peers(count: int) -> dict[str, Function]:
    """Return what is installed and takes the shape; an own reference by sorting where the entmax package is not."""
    found: dict[str, Function] = {}
    if count <= 1024:
        if importlib.util.find_spec("entmax"):
            import entmax

            found["entmax package"] = partial(_dense, entmax.entmax15)
        else:
            found["sort-based reference"] = partial(_dense, entmax15_by_sorting)
    if importlib.util.find_spec("adasplash") and count & (count - 1) == 0:
        from adasplash import adasplash

        found["adasplash"] = partial(adasplash, alpha=1.5, is_causal=False)
    return found


def _dense(normalize: Callable, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return normalize(q @ k.transpose(2, 3) * q.shape[-1] ** -0.5, -1).to(v.dtype) @ v


def entmax15_by_sorting(e: Tensor, dim: int) -> Tensor:
    """Return entmax15: of the thresholds that the largest k scores give, the one whose support has k scores."""
    x = e.float() / 2
    ordered = x.sort(dim, descending=True).values
    count = torch.arange(1, x.shape[dim] + 1, device=x.device)
    mean, square = ordered.cumsum(dim) / count, ordered.square().cumsum(dim) / count
    spread = (1 - count * (square - mean.square())) / count
    thresholds = mean - spread.clamp(min=0).sqrt()
    size = (thresholds <= ordered).sum(dim, keepdim=True)
    return (x - thresholds.gather(dim, size - 1)).clamp(min=0).square()
