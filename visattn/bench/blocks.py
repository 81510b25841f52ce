"""`visattn bench blocks`: every block against other implementations of it, ratios in one run."""

import statistics
from collections.abc import Callable
from functools import partial

import torch
from rich.progress import track
from torch import Tensor, nn

from visattn.bench.peers import OURS, PEERS
from visattn.bench.timing import Timing, measure, table
from visattn.blocks.catalog import create_block

HEADER = (
    "block",
    "peer",
    "forward",
    "forward+backward",
    "peer's",
    "peer's both",
    "peer / it",
    "peer / it, both",
)
SHAPES = ((8, 256, 28, 28), (8, 64, 56, 56))
# The geometric mean over these is the headline; every peer counts where there are several.
HEADLINE = (
    "se eca cbam bam coord gc simam triplet a2 sge shuffle non_local pam cam criss_cross polarized"
).split()  # fmt: skip


def run(
    *,
    blocks: str = ",".join(PEERS),
    repeats: int = 7,
    threads: int = 1,
    channels_last: bool = False,
) -> None:
    """Print what each block costs beside timm's layer or the straightforward form, at two sizes of map.

    Args:
        blocks: Names of blocks, with commas between.
        repeats: Measurements each; the median is shown with its spread.
        threads: Threads of torch.
        channels_last: Measure in channels-last memory order.
    """
    names = [name.strip() for name in blocks.split(",")]
    for name in names:
        if name not in PEERS:
            raise ValueError(
                f"there is no peer of {name!r} to measure against; there are {', '.join(PEERS)}"
            )
    torch.set_num_threads(threads)
    for shape in SHAPES:
        order = torch.channels_last if channels_last else torch.contiguous_format
        x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).contiguous(
            memory_format=order
        )
        rows, ratios = [], {}
        for name in track(names, f"{shape}", transient=True):
            found, ratios[name] = _rows(name, x, repeats)
            rows += found
        print(
            f"\n(B, C, H, W) = {shape}, float32, {threads} thread(s), ms of process CPU time: median (low-high)"
        )
        print(table(HEADER, rows))
        _say("all", ratios)
        if set(HEADLINE) <= ratios.keys():
            _say("the sixteen of the headline", {name: ratios[name] for name in HEADLINE})


def _say(what: str, ratios: dict[str, tuple[float, float]]) -> None:
    forward, both = (statistics.geometric_mean(r[i] for r in ratios.values()) for i in (0, 1))
    print(
        f"geometric mean over {what}, fastest peer / it: {forward:.2f} forward, {both:.2f} forward+backward"
    )


def _rows(name: str, x: Tensor, repeats: int) -> tuple[list[tuple], tuple[float, float]]:
    """The rows of one block, one per peer, and the ratios to the fastest peer."""
    builders: dict[str, Callable[[int], nn.Module]] = {
        "it": lambda channels: create_block(
            name, channels, **OURS.get(name, lambda _: {})(channels)
        ),
        **PEERS[name],
    }
    models = {label: build(x.shape[1]) for label, build in builders.items()}
    forward = measure(
        {label: partial(_forward, model.eval(), x) for label, model in models.items()},
        repeats=repeats,
    )
    gradient = torch.randn_like(x)
    both = {label: partial(_both, model.train(), x, gradient) for label, model in models.items()}
    both = measure(both, repeats=repeats)
    own = forward.pop("it"), both.pop("it")
    rows = [
        (
            name,
            label,
            *own,
            forward[label],
            both[label],
            _ratio(forward[label], own[0]),
            _ratio(both[label], own[1]),
        )
        for label in forward
    ]
    fastest = (
        min(t.median for t in times.values()) / mine.median
        for times, mine in zip((forward, both), own, strict=True)
    )
    return rows, tuple(fastest)


def _ratio(theirs: Timing, ours: Timing) -> str:
    return f"{theirs.median / ours.median:.2f}"


def _forward(model: nn.Module, x: Tensor) -> None:
    with torch.no_grad():
        model(x)


def _both(model: nn.Module, x: Tensor, gradient: Tensor) -> None:
    model(x.detach().requires_grad_()).backward(gradient)
