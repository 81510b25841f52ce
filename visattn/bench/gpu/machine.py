"""The GPU that is measured: its clock, its memory, and its two ceilings."""

import platform
import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from visattn.bench.timing import Timing

Work = Callable[[], object]
_CACHE = 256 * 2**20  # bytes written between samples, so that none finds its input in the cache


@dataclass(frozen=True)
class Machine:
    """How things are measured, and what the device can do at most: bytes and bf16 operations in a millisecond."""

    device: torch.device
    measure: Callable[[dict[str, Work]], dict[str, Timing]]
    peak: Callable[[Work], float]
    compile: Callable
    bytes_per_ms: float = 1.0
    flops_per_ms: float = 1.0

    def floor(self, flops: float, moved: float) -> float:
        """Return the milliseconds that no version can beat."""
        return max(flops / self.flops_per_ms, moved / self.bytes_per_ms)

    def calibrated(self) -> "Machine":
        """Return this machine with its ceilings measured: a large copy and a large matrix product."""
        source = torch.randn(2**28, device=self.device)
        target = torch.empty_like(source)
        a, b = (torch.randn(8192, 8192, device=self.device, dtype=torch.bfloat16) for _ in range(2))
        times = self.measure({"copy": lambda: target.copy_(source), "product": lambda: a @ b})
        moved, flops = 2 * source.nbytes, 2 * 8192**3
        return replace(
            self, bytes_per_ms=moved / times["copy"].low, flops_per_ms=flops / times["product"].low
        )


def cuda_machine() -> Machine:
    return Machine(torch.device("cuda"), measure, peak, torch.compile).calibrated()


def measure(functions: dict[str, Work], repeats: int = 15, warmup: int = 3) -> dict[str, Timing]:
    """Return milliseconds by CUDA events; the functions take turns, each from a cold cache."""
    samples: dict[str, list[float]] = {name: [] for name in functions}
    flush = torch.empty(_CACHE, dtype=torch.uint8, device="cuda")
    for turn in range(warmup + repeats):
        for name, function in functions.items():
            flush.zero_()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            function()
            end.record()
            end.synchronize()
            if turn >= warmup:
                samples[name].append(start.elapsed_time(end))
    return {
        name: Timing(statistics.median(times), min(times), max(times))
        for name, times in samples.items()
    }


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
