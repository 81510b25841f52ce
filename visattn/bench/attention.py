"""`visattn bench attention`: every pair against the dense definition, the fused softmax and the entmax package."""

import importlib.util
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from rich.progress import track
from torch import Tensor

from visattn.bench.timing import extra_memory, measure, table
from visattn.core.formula import attend, plan
from visattn.core.normalize import NORMALIZERS
from visattn.core.similarity import SIMILARITIES
from visattn.names import lookup

PAIRS = (
    "scaled_dot-softmax dot-softmax bilinear-softmax cosine-softmax negative_l2-softmax scaled_dot-softmax1 "
    "scaled_dot-entmax15 scaled_dot-sparsemax scaled_dot-entmax scaled_dot-sigmoid scaled_dot-relu scaled_dot-double "
    "scaled_dot-sinkhorn scaled_dot-topk scaled_dot-none linear-none linear-l1 efficient-l1"
).split()
_HEAD_DIM, _HEADS = 64, 6


def run(
    *,
    pairs: str = ",".join(PAIRS),
    tokens: str = "197,577,2305",
    repeats: int = 5,
    threads: int = 1,
    time_only: bool = False,
) -> None:
    """Print, per pair and number of tokens, the evaluation chosen, its cost, and ratios to its references.

    Args:
        pairs: similarity-normalizer, by the names of the tables, with commas between.
        tokens: Numbers of tokens, with commas between; 8 images up to 300 tokens, one above.
        repeats: Measurements each; the median is shown with its spread.
        threads: Threads of torch.
        time_only: Leave out the extra memory of forward and backward, which is measured in fresh
            processes.
    """
    names, counts = [_checked(pair.strip()) for pair in pairs.split(",")], _numbers(tokens)
    torch.set_num_threads(threads)
    for count in counts:
        shape = (8 if count <= 300 else 1, _HEADS, count, _HEAD_DIM)
        rows = [
            _row(pair, shape, repeats, not time_only)
            for pair in track(names, f"{count} tokens", transient=True)
        ]
        print(
            f"\n(B, H, N, D) = {shape}, float32, {threads} thread(s), ms of process CPU time: median (low-high)"
        )
        print(table(_HEADER, rows))


def _checked(pair: str) -> str:
    """Refuse a pair whose halves are not in the tables."""
    similarity, _, normalizer = pair.partition("-")
    for part, known in ((similarity, SIMILARITIES), (normalizer, NORMALIZERS)):
        lookup(known, part, "pairs")
    return pair


def _numbers(tokens: str) -> list[int]:
    try:
        counts = [int(count) for count in tokens.split(",")]
    except ValueError:
        raise ValueError(
            f"tokens must be whole numbers with commas between, got {tokens!r}"
        ) from None
    if min(counts) < 1:
        raise ValueError(f"tokens must be at least 1, got {tokens!r}")
    return counts


_HEADER = (
    "pair",
    "evaluation",
    "forward",
    "forward+backward",
    "dense / it",
    "it / SDPA softmax",
    "package / it",
    "extra MiB",
    "dense MiB",
)


def _row(pair: str, shape: tuple[int, ...], repeats: int, memory: bool) -> list[object]:
    """Measure one pair and its references in turns."""
    functions = {
        "it": _pair(pair, "auto"),
        "dense": _pair(pair, "dense"),
        "sdpa": F.scaled_dot_product_attention,
    }
    package = _package(pair)
    if package is not None:
        functions["package"] = package
    inputs = _inputs(shape)
    forward = measure(
        {name: partial(_forward, f, inputs) for name, f in functions.items()}, repeats=repeats
    )
    both = measure(
        {name: partial(_both, f, inputs) for name, f in functions.items()}, repeats=repeats
    )
    ratio = _ratios(forward, both)
    extra = [
        f"{extra_memory(partial(_prepare, pair, impl, shape)):.0f}" if memory else "-"
        for impl in ("auto", "dense")
    ]
    chosen = plan(*inputs, *_modules(pair)).impl
    return [pair, chosen, forward["it"], both["it"], *ratio, *extra]


def _ratios(forward: dict, both: dict) -> list[str]:
    def quotient(over: str, under: str) -> str:
        if over not in forward or under not in forward:
            return "-"
        parts = (times[over].median / times[under].median for times in (forward, both))
        return " / ".join(f"{part:.2f}x" for part in parts)

    return [quotient("dense", "it"), quotient("it", "sdpa"), quotient("package", "it")]


def _modules(pair: str) -> tuple[torch.nn.Module, torch.nn.Module]:
    similarity, normalizer = pair.split("-")
    return SIMILARITIES[similarity](_HEAD_DIM, _HEADS), NORMALIZERS[normalizer](_HEADS)


def _pair(pair: str, impl: str) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    similarity, normalizer = _modules(pair)
    return lambda q, k, v: attend(q, k, v, similarity, normalizer, impl=impl)


def _package(pair: str) -> Callable[[Tensor, Tensor, Tensor], Tensor] | None:
    """Return the entmax package's form of a pair, where it is installed and has one."""
    if pair not in ("scaled_dot-entmax15", "scaled_dot-sparsemax") or not importlib.util.find_spec(
        "entmax"
    ):
        return None
    import entmax

    function = getattr(entmax, pair.split("-")[1])
    return lambda q, k, v: function(q @ k.transpose(2, 3) * q.shape[-1] ** -0.5, -1) @ v


def _inputs(shape: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, requires_grad=True) for _ in range(3)]


def _forward(function: Callable, inputs: list[Tensor]) -> None:
    with torch.no_grad():
        function(*inputs)


def _both(function: Callable, inputs: list[Tensor]) -> None:
    m = function(*inputs)
    torch.autograd.grad(m, inputs, m.detach())


def _prepare(pair: str, impl: str, shape: tuple[int, ...]) -> Callable[[], None]:
    """Return the work whose memory is measured, after a small call has loaded every library it needs."""
    torch.set_num_threads(1)
    function = _pair(pair, impl)
    _both(function, _inputs((1, _HEADS, 64, _HEAD_DIM)))
    return partial(_both, function, _inputs(shape))
