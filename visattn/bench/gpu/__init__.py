"""`visattn bench gpu`: results and speed on a GPU; also ``python -m visattn.bench.gpu --out DIR``.

The second form needs torch, torchvision, timm and triton only.
"""

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from visattn.bench.gpu import attention, gates, machine, maps, training
from visattn.bench.gpu.report import BenchmarkReport
from visattn.core.kernels.triton.device import unavailable

Section = Callable[[machine.Machine], list]
CHECKS: dict[str, Section] = {
    "attention": attention.checks,
    "rollout": maps.checks,
    "gates": gates.checks,
}
SECTIONS: dict[str, Section] = {
    "Attention": attention.rows,
    "Rollout": maps.rows,
    "Gates": gates.rows,
}
for _name, _pair in training.PAIRS.items():
    SECTIONS[f"Training steps of {_name}"] = partial(training.rows, pair=_pair)


def run(*, out: str = "bench-gpu", minutes: float = 8.0) -> int:
    """Check results against float64, then measure attention, maps, training steps and gates.

    Writes gpu.json and gpu.md.

    Args:
        out: Folder for the two files.
        minutes: Time after which no further section is begun.
    """
    reason = "there is no CUDA device"
    if torch.cuda.is_available():
        reason = unavailable(torch.device("cuda"))
    if reason is not None:
        print(f"nothing was measured: {reason}")
        return 2
    torch.manual_seed(0)
    gpu = machine.cuda_machine()
    report = BenchmarkReport(machine.facts(gpu, f"visattn bench gpu --out {out}"))
    fill_report(report, gpu, time.monotonic() + 60 * minutes)
    report.write(Path(out))
    print(report.markdown())
    return 0 if all(check.right for check in report.checks) else 1


def fill_report(report: BenchmarkReport, gpu: machine.Machine, deadline: float) -> None:
    """Fill a report, the checks first; what fails or is too late is named with the reason."""
    for name, check in CHECKS.items():
        checks = _try_section(report, f"{name}, correctness", deadline, partial(check, gpu))
        report.checks.extend(checks or [])
    for name, section in SECTIONS.items():
        measurements = _try_section(report, name, deadline, partial(section, gpu))
        if measurements is not None:
            report.sections[name] = measurements


def _try_section(
    report: BenchmarkReport, name: str, deadline: float, work: Callable[[], list]
) -> list | None:
    """The results of a section; None, with the reason in the report, where there are none."""
    if time.monotonic() > deadline:
        report.missing[name] = "the time was up"
        return None
    try:
        return work()
    # out of memory, or refused by a compiler: the other sections go on
    except (RuntimeError, ValueError) as error:
        message = " ".join(str(error).split())
        report.missing[name] = f"{type(error).__name__}: {message[:200]}"
        return None
