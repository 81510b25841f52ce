"""`visattn blocks`: the table of all blocks, with what each costs here."""

import inspect
import sys

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from visattn.bench.timing import measure, table
from visattn.blocks.catalog import BLOCKS, create_block
from visattn.blocks.reference import KEY_MAPS
from visattn.record.session import capture

HEADER = (
    "block",
    "class",
    "year",
    "parameters",
    "MFLOPs",
    "forward ms",
    "forward + backward ms",
    "map",
    "weights of",
)


def run(
    *,
    channels: int = 256,
    height: int = 28,
    width: int = 28,
    batch: int = 2,
    repeats: int = 5,
    kind: str | None = None,
    block: str | None = None,
) -> None:
    """Print every block with its class, year, size, cost on this machine and map.

    Times are medians of process CPU time at one thread, for a whole batch. FLOPs are those of
    convolutions and matrix products, two per multiplication, for one image.

    Args:
        channels: Channels of the feature map.
        height: Rows of the feature map.
        width: Columns of the feature map.
        batch: Images in the timed batch.
        repeats: Timed runs; 0 leaves the times out.
        kind: Only blocks of this class: channel, spatial, both, branch, token or context.
        block: Only this block.
    """
    names = _chosen(kind, block)
    shape = (batch, channels, height, width)
    if min(shape) < 1 or batch < 2 or repeats < 0:
        raise ValueError(
            f"batch must be 2 or more to train, sizes 1 or more, repeats 0 or more; got {shape}, {repeats}"
        )
    notes: list[str] = []
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        shown = track(
            names,
            "measuring",
            console=Console(stderr=True),
            transient=True,
            disable=not sys.stderr.isatty(),
        )
        rows = [_row(name, shape, repeats, notes) for name in shown]
    finally:
        torch.set_num_threads(threads)
    print(
        f"{len(rows)} blocks at (B, C, H, W) = {shape}, {torch.get_default_dtype()}, one CPU thread\n"
    )
    print(table(HEADER, rows))
    print("".join(f"\n{note}" for note in notes))


def _chosen(kind: str | None, block: str | None) -> list[str]:
    """The names that the filters leave."""
    if block is not None and block not in BLOCKS:
        create_block(block, 1)  # raises, with the nearest name
    names = [
        name
        for name, entry in BLOCKS.items()
        if kind in (None, entry.family) and block in (None, name)
    ]
    if not names:
        kinds = ", ".join(dict.fromkeys(entry.family for entry in BLOCKS.values()))
        raise ValueError(f"no block has class {kind!r}; classes are {kinds}")
    return names


def _row(name: str, shape: tuple[int, int, int, int], repeats: int, notes: list[str]) -> tuple:
    """One row of the table; why a block does not fit the channels goes to the notes."""
    entry = BLOCKS[name]
    start = (name, entry.family, entry.year)
    sources = ", ".join(KEY_MAPS.get(entry.block.__name__, {})) or "-"
    try:
        model = create_block(name, shape[1])
    except ValueError as error:
        notes.append(f"{name}: {error}")
        return (*start, "-", "-", "-", "-", "-", sources)
    maps = inputs(model, shape)
    parameters = f"{sum(p.numel() for p in model.parameters()):,}"
    forward, both = _times(model, maps, repeats) if repeats else ("-", "-")
    return (
        *start,
        parameters,
        f"{_flops(model, maps) / 1e6:.3g}",
        forward,
        both,
        _kinds(model, maps),
        sources,
    )


def inputs(block: nn.Module, shape: tuple[int, int, int, int]) -> list[Tensor]:
    """Random maps, as many as the block takes."""
    number = len(inspect.signature(block.forward).parameters)
    return [torch.randn(shape, generator=torch.Generator().manual_seed(i)) for i in range(number)]


def _times(block: nn.Module, maps: list[Tensor], repeats: int) -> tuple[str, str]:
    learned = [x.clone().requires_grad_() for x in maps]
    gradient = torch.randn_like(maps[0])

    def forward() -> None:
        with torch.no_grad():
            block.eval()(*maps)

    def both() -> None:
        block.train()(*learned).backward(gradient)

    timings = measure({"forward": forward, "both": both}, repeats=repeats, warmup=1)
    return f"{timings['forward'].median:.3g}", f"{timings['both'].median:.3g}"


def _flops(block: nn.Module, maps: list[Tensor]) -> int:
    """Operations of convolutions and matrix products for one image."""
    with FlopCounterMode(display=False) as counter:
        block.eval()(*(x[:1] for x in maps))
    return counter.get_total_flops()


def _kinds(block: nn.Module, maps: list[Tensor]) -> str:
    """What the block's maps weigh, by what is captured of one image."""
    with torch.no_grad(), capture(block.eval()) as records:
        block(*(x[:1] for x in maps))
    return " + ".join(dict.fromkeys(record.kind for record in records.records))
