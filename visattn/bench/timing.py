"""Measure functions against each other: interleaved process CPU time, and extra memory."""

import gc
import multiprocessing
import resource
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
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
    functions: Mapping[str, Callable[[], object]], *, repeats: int = 7, warmup: int = 2
) -> dict[str, Timing]:
    """The cost of each function.

    They take turns, so that a change of the machine's speed affects all of them.
    """
    samples: dict[str, list[float]] = {name: [] for name in functions}
    for turn in range(warmup + repeats):
        for name, function in functions.items():
            start = time.process_time()
            function()
            if turn >= warmup:
                samples[name].append(1000 * (time.process_time() - start))
    return summarize(samples)


def summarize(samples: dict[str, list[float]]) -> dict[str, Timing]:
    """Median, smallest and largest of the samples of each name."""
    timings = {}
    for name, times in samples.items():
        timings[name] = Timing(statistics.median(times), min(times), max(times))
    return timings


def _peak_mib() -> float:
    """The peak of resident memory: on Linux since the last reset, elsewhere since the start."""
    if _STATUS.exists():
        for line in _STATUS.read_text().splitlines():
            if line.startswith("VmHWM"):
                _, kibibytes, _ = line.split()
                return int(kibibytes) / 1024
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
    """By how many MiB the peak of a fresh process rises while a function runs.

    Args:
        prepare: returns the function; itself a function of a module, or a ``functools.partial`` of
            one, since a new process imports it.
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
            "the measured process ended without a result; its error is printed above"
        ) from None
    finally:
        process.join()


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table with aligned columns."""
    cells = [[str(cell) for cell in row] for row in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = []
    for row in cells:
        padded = map(str.ljust, row, widths)
        lines.append(f"| {' | '.join(padded)} |")
    rule = "|".join("-" * (width + 2) for width in widths)
    return "\n".join([lines[0], f"|{rule}|", *lines[1:]])
