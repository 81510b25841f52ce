"""`visattn bench blocks`: every block against other implementations of it, ratios in one run."""

import statistics
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
    """The rows of one block, one per peer, and the ratios of the fastest peer to it."""
    models = _build_models(name, x.shape[1])
    forward = measure(
        {label: partial(_forward, model.eval(), x) for label, model in models.items()},
        repeats=repeats,
    )
    gradient = torch.randn_like(x)
    both = measure(
        {label: partial(_both, model.train(), x, gradient) for label, model in models.items()},
        repeats=repeats,
    )
    our_forward = forward.pop("it")
    our_both = both.pop("it")
    rows = []
    for label in forward:
        forward_ratio = _ratio(forward[label], our_forward)
        both_ratio = _ratio(both[label], our_both)
        times = (our_forward, our_both, forward[label], both[label])
        rows.append((name, label, *times, forward_ratio, both_ratio))
    ratios = (
        _fastest(forward) / our_forward.median,
        _fastest(both) / our_both.median,
    )
    return rows, ratios


def _build_models(name: str, channels: int) -> dict[str, nn.Module]:
    """Our block as "it", and its peers by label."""
    options = OURS[name](channels) if name in OURS else {}
    models: dict[str, nn.Module] = {"it": create_block(name, channels, **options)}
    for label, build in PEERS[name].items():
        models[label] = build(channels)
    return models


def _fastest(times: dict[str, Timing]) -> float:
    return min(timing.median for timing in times.values())


def _ratio(theirs: Timing, ours: Timing) -> str:
    return f"{theirs.median / ours.median:.2f}"


def _forward(model: nn.Module, x: Tensor) -> None:
    with torch.no_grad():
        model(x)


def _both(model: nn.Module, x: Tensor, gradient: Tensor) -> None:
    model(x.detach().requires_grad_()).backward(gradient)
