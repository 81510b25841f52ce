"""The GPU that is measured: its clock, its memory, and its two ceilings."""

import platform
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch

from visattn.bench.timing import Timing, summarize

_SIDE = 8192  # of the matrices of the product
Work = Callable[[], object]
_CACHE = 256 * 2**20  # bytes written between samples, so that none finds its input in the cache


@dataclass(frozen=True)
class Machine:
    """How to measure, and the most that the device can do: bytes and bf16 operations per ms."""

    device: torch.device
    measure: Callable[[Mapping[str, Work]], dict[str, Timing]]
    peak: Callable[[Work], float]
    compile: Callable
    bytes_per_ms: float = 1.0
    flops_per_ms: float = 1.0

    def floor(self, flops: float, moved: float) -> float:
        """Return the milliseconds that no version can beat."""
        return max(flops / self.flops_per_ms, moved / self.bytes_per_ms)

    def calibrated(self) -> "Machine":
        """This machine with measured ceilings: of a large copy and a large matrix product."""
        source = torch.randn(2**28, device=self.device)
        target = torch.empty_like(source)
        shape = (_SIDE, _SIDE)
        a = torch.randn(shape, device=self.device, dtype=torch.bfloat16)
        b = torch.randn(shape, device=self.device, dtype=torch.bfloat16)
        work: dict[str, Work] = {
            "copy": lambda: target.copy_(source),
            "product": lambda: a @ b,
        }
        times = self.measure(work)
        moved_bytes = 2 * source.nbytes  # read and written
        flops = 2 * _SIDE**3
        return replace(
            self,
            bytes_per_ms=moved_bytes / times["copy"].low,
            flops_per_ms=flops / times["product"].low,
        )


def cuda_machine() -> Machine:
    return Machine(torch.device("cuda"), measure, peak, torch.compile).calibrated()


def measure(functions: Mapping[str, Work], repeats: int = 15, warmup: int = 3) -> dict[str, Timing]:
    """Return milliseconds by CUDA events; the functions take turns, each from a cold cache."""
    samples: dict[str, list[float]] = {name: [] for name in functions}
    flush = torch.empty(_CACHE, dtype=torch.uint8, device="cuda")
    for turn in range(warmup + repeats):
        for name, function in functions.items():
            flush.zero_()
            start = torch.cuda.Event(enable_timing=True)
            end = torch.cuda.Event(enable_timing=True)
            start.record()
            function()
            end.record()
            end.synchronize()
            if turn >= warmup:
                samples[name].append(start.elapsed_time(end))
    return summarize(samples)


def peak(function: Work) -> float:
    """Return by how many MiB the allocated memory rises at its peak while a function runs."""
    function()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def facts(machine: Machine, command: str) -> dict[str, str]:
    """Return what a reader needs to judge the numbers, without the machine's name."""
    import timm
    import triton

    versions = {"torch": torch.__version__, "triton": triton.__version__, "timm": timm.__version__}
    return {
        "command": command,
        "device": torch.cuda.get_device_name(machine.device),
        "compute capability": "{}.{}".format(*torch.cuda.get_device_capability(machine.device)),
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
        "python": platform.python_version(),
        "copy, bytes read and written": f"{machine.bytes_per_ms / 1e6:.0f} GB/s",
        "bf16 matrix product": f"{machine.flops_per_ms / 1e9:.0f} TFLOP/s",
    }
