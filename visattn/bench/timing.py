"""Measure functions against each other: process CPU time, interleaved, medians with their spread; extra memory."""

import gc
import multiprocessing
import resource
import statistics
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

_STATUS = Path("/proc/self/status")


class Timing(NamedTuple):
    """Milliseconds of process CPU time: median, smallest and largest of the repeats."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.3g} ({self.low:.3g}-{self.high:.3g})"


def measure(
    functions: dict[str, Callable[[], object]], *, repeats: int = 7, warmup: int = 2
) -> dict[str, Timing]:
    """Return the cost of each function; they take turns, so that a change of the machine's speed meets all of them."""
    samples: dict[str, list[float]] = {name: [] for name in functions}
    for turn in range(warmup + repeats):
        for name, function in functions.items():
            start = time.process_time()
            function()
            if turn >= warmup:
                samples[name].append(1000 * (time.process_time() - start))
    return {
        name: Timing(statistics.median(times), min(times), max(times))
        for name, times in samples.items()
    }


def _peak_mib() -> float:
    """Return the peak of resident memory; Linux tells it since the last reset, other systems since the start."""
    if _STATUS.exists():
        line = next(line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _peak(prepare: Callable[[], Callable[[], object]], pipe: Connection) -> None:
    work = prepare()
    gc.collect()
    if _STATUS.exists():
        Path("/proc/self/clear_refs").write_text("5")
    before = _peak_mib()
    work()
    pipe.send(_peak_mib() - before)


def extra_memory(prepare: Callable[[], Callable[[], object]]) -> float:
    """Return by how many MiB the peak of a fresh process rises while the function that ``prepare`` returns runs.

    Args:
        prepare: A function of a module, or a ``functools.partial`` of one, since a new process
            imports it.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_peak, args=(prepare, sender))
    process.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError:
        raise RuntimeError(
            "the measured process ended without a result; its error stands above"
        ) from None
    finally:
        process.join()


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Return a Markdown table, columns aligned."""
    cells = [[str(cell) for cell in row] for row in (header, *rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
        for row in cells
    ]
    return "\n".join(
        [lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]]
    )
