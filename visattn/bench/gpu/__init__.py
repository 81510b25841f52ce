"""`visattn bench gpu`: where the toolkit stands on a GPU; also ``python -m visattn.bench.gpu --out DIR``.

The second form needs torch, torchvision, timm and triton only.
"""

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from visattn.bench.gpu import attention, gates, machine, maps, training
from visattn.bench.gpu.report import Report
from visattn.core.kernels.triton.device import unavailable

CHECKS = {"attention": attention.checks, "rollout": maps.checks, "gates": gates.checks}
SECTIONS = {"Attention": attention.rows, "Rollout": maps.rows, "Gates": gates.rows}
SECTIONS |= {
    f"Training steps of {name}": partial(training.rows, pair=pair)
    for name, pair in training.PAIRS.items()
}


def run(*, out: str = "bench-gpu", minutes: float = 8.0) -> int:
    """Check results against float64, measure attention, maps, training steps and gates, write gpu.json and gpu.md.

    Args:
        out: Folder for the two files.
        minutes: Time after which no further section is begun.
    """
    why = (
        unavailable(torch.device("cuda"))
        if torch.cuda.is_available()
        else "there is no CUDA device"
    )
    if why is not None:
        print(f"nothing was measured: {why}")
        return 2
    torch.manual_seed(0)
    here = machine.cuda_machine()
    report = Report(machine.facts(here, f"visattn bench gpu --out {out}"))
    measured(report, here, time.monotonic() + 60 * minutes)
    report.write(Path(out))
    print(report.markdown())
    return 0 if all(check.right for check in report.checks) else 1


def measured(report: Report, here: machine.Machine, deadline: float) -> None:
    """Fill a report, the checks first; what fails or comes too late is named in place of its numbers."""
    for name, function in CHECKS.items():
        _tried(
            report,
            f"{name}, correctness",
            deadline,
            lambda f=function: report.checks.extend(f(here)),
        )
    for name, function in SECTIONS.items():
        _tried(
            report, name, deadline, lambda n=name, f=function: report.sections.update({n: f(here)})
        )


def _tried(report: Report, name: str, deadline: float, work: Callable[[], None]) -> None:
    if time.monotonic() > deadline:
        report.missing[name] = "the time was up"
        return
    try:
        work()
    except (
        RuntimeError,
        ValueError,
    ) as error:  # out of memory, a compiler's refusal: the other sections go on
        report.missing[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
