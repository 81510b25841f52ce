"""`visattn blocks`: the table of all blocks, with what each costs on this machine."""

import inspect
from collections.abc import Callable
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from visattn.bench.timing import measure, table
from visattn.blocks.catalog import BLOCKS, create_block
from visattn.blocks.reference import KEY_MAPS
from visattn.commands.inputs import show_progress
from visattn.names import lookup
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

Shape = tuple[int, int, int, int]


class Cost(NamedTuple):
    """What a block costs, as cells of the table."""

    parameters: str = "-"
    mflops: str = "-"
    forward_ms: str = "-"
    both_ms: str = "-"
    map_kinds: str = "-"


def run(
    *,
    channels: int = 256,
    height: int = 28,
    width: int = 28,
    batch: int = 2,
    repeats: int = 5,
    family: str | None = None,
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
        family: Only blocks of this class: channel, spatial, both, branch, token or context.
        block: Only this block.
    """
    names = choose_blocks(family, block)
    shape = (batch, channels, height, width)
    if min(shape) < 1 or batch < 2 or repeats < 0:
        raise ValueError(
            "batch must be 2 or more to train, sizes 1 or more, repeats 0 or more; "
            f"got {shape}, {repeats}"
        )
    refusals: list[str] = []
    rows = []
    with one_thread():
        for name in show_progress(names, "measuring", len(names)):
            rows.append(table_row(name, shape, repeats, refusals))
    dtype = torch.get_default_dtype()
    print(f"{len(rows)} blocks at (B, C, H, W) = {shape}, {dtype}, one CPU thread\n")
    print(table(HEADER, rows))
    print("".join(f"\n{refusal}" for refusal in refusals))


@contextmanager
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def choose_blocks(family: str | None, block: str | None) -> list[str]:
    """Return the names that both filters leave."""
    names = list(BLOCKS)
    if block is not None:
        lookup(BLOCKS, block, "block")
        names = [block]
    if family is not None:
        names = [name for name in names if BLOCKS[name].family == family]
    if not names:
        families = dict.fromkeys(entry.family for entry in BLOCKS.values())
        raise ValueError(f"no block has class {family!r}; classes are {', '.join(families)}")
    return names


def table_row(name: str, shape: Shape, repeats: int, refusals: list[str]) -> tuple:
    """Measure one block; why it does not fit the channels goes to the refusals."""
    entry = BLOCKS[name]
    sources = ", ".join(KEY_MAPS.get(entry.block.__name__, {})) or "-"
    cost = Cost()
    try:
        block = create_block(name, shape[1])
    except ValueError as error:
        refusals.append(f"{name}: {error}")
    else:
        cost = measure_block(block, shape, repeats)
    return (name, entry.family, entry.year, *cost, sources)


def measure_block(block: nn.Module, shape: Shape, repeats: int) -> Cost:
    inputs = random_inputs(block, shape)
    parameters = sum(parameter.numel() for parameter in block.parameters())
    forward_ms = both_ms = "-"
    if repeats > 0:
        forward_ms, both_ms = time_block(block, inputs, repeats)
    mflops = count_flops(block, inputs) / 1e6
    return Cost(f"{parameters:,}", f"{mflops:.3g}", forward_ms, both_ms, map_kinds(block, inputs))


def random_inputs(block: nn.Module, shape: Shape) -> list[Tensor]:
    """Return random feature maps, as many as the block takes."""
    count = len(inspect.signature(block.forward).parameters)
    generators = [torch.Generator().manual_seed(seed) for seed in range(count)]
    return [torch.randn(shape, generator=generator) for generator in generators]


def time_block(block: nn.Module, inputs: list[Tensor], repeats: int) -> tuple[str, str]:
    """Return medians in ms: forward in evaluation, forward and backward in training."""
    leaves = [x.clone().requires_grad_() for x in inputs]
    gradient = torch.randn_like(inputs[0])

    def forward() -> None:
        with torch.no_grad():
            block.eval()(*inputs)

    def forward_and_backward() -> None:
        block.train()(*leaves).backward(gradient)

    contestants: dict[str, Callable[[], object]] = {
        "forward": forward,
        "both": forward_and_backward,
    }
    timings = measure(contestants, repeats=repeats, warmup=1)
    return f"{timings['forward'].median:.3g}", f"{timings['both'].median:.3g}"


def count_flops(block: nn.Module, inputs: list[Tensor]) -> int:
    """Count the operations of convolutions and matrix products for one image."""
    with FlopCounterMode(display=False) as counter:
        block.eval()(*(x[:1] for x in inputs))
    return counter.get_total_flops()


def map_kinds(block: nn.Module, inputs: list[Tensor]) -> str:
    """Return the kinds of maps that are captured for one image."""
    with torch.no_grad(), capture(block.eval()) as maps:
        block(*(x[:1] for x in inputs))
    kinds = dict.fromkeys(record.kind for record in maps.records)
    return " + ".join(kinds)
