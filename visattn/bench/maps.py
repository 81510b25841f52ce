"""`visattn bench maps`: rollout, GAE and class-token rows by the row chain, against whole eager matrices.

ViT-S/16 of timm with random weights, one image, float32.
"""

import gc
from collections.abc import Callable
from functools import partial

import timm
import torch
from rich.progress import track
from torch import Tensor, nn

from visattn.bench.timing import Timing, extra_memory, measure, table
from visattn.map import Map
from visattn.methods.gradient import gae
from visattn.methods.rollout import rollout
from visattn.metrics.pixels import deletion, insertion
from visattn.record.session import capture

_HEADER = ("what", "tokens", "ms of CPU time", "extra MiB", "compared", "time", "memory")
_AGAINST = {"class-token rows": "plain forward", "rollout": "eager rollout", "GAE": "eager GAE"}


def run(
    sizes: tuple[int, ...] = (224, 768),
    /,
    *,
    largest: int = 1536,
    repeats: int = 3,
    threads: int = 1,
) -> None:
    """Print time and extra memory of maps at several image sizes, and their ratio to eager capture.

    Args:
        sizes: Sides of the image in pixels; multiples of 16.
        largest: Side at which rollout alone runs, to see that it fits; 0 leaves it and insertion
            and deletion out.
        repeats: Measurements each, more where images are small; the median is shown with its
            spread.
        threads: Threads of torch.
    """
    torch.set_num_threads(threads)
    rows = []
    for size in track(sizes, "sizes", transient=True):
        rows += _rows(size, repeats)
    print(
        f"\nViT-S/16, one image, float32, {threads} thread(s); extra memory over the loaded model, in fresh processes"
    )
    print(table(_HEADER, rows))
    if largest:
        mib = extra_memory(partial(_prepare, _rollout, largest))
        print(f"\nrollout at {(largest // 16) ** 2 + 1} tokens: {mib:.0f} MiB")
        curves = ", ".join(f"{name} {timing}" for name, timing in _curves(repeats).items())
        print(f"\none image of 64 x 64 pixels, ViT-Ti/16, 100 steps: {curves} ms of CPU time")


def _rows(size: int, repeats: int) -> list[list[object]]:
    work = {
        "plain forward": _plain,
        "class-token rows": _class_rows,
        "rollout": _rollout,
        "eager rollout": _eager_rollout,
    }
    work |= {"GAE": _gae, "eager GAE": _eager_gae}
    repeats *= max(1, round((768 / size) ** 2))  # short work differs more from one time to the next
    times = measure(
        {name: _prepare(function, size) for name, function in work.items()},
        repeats=repeats,
        warmup=1,
    )
    memory = {}
    for name, function in work.items():
        memory[name] = extra_memory(partial(_prepare, function, size))
    tokens = (size // 16) ** 2 + 1  # patches and the class token
    rows = []
    for name in work:
        comparison = _compare(name, times, memory)
        rows.append([name, tokens, times[name], f"{memory[name]:.0f}", *comparison])
    return rows


def _compare(name: str, times: dict, memory: dict) -> tuple[str, str, str]:
    """How time and memory compare: rows by what they add to a plain pass, methods by ratios."""
    reference = _AGAINST.get(name)
    if reference is None:
        return "", "", ""
    speed = times[reference].median / times[name].median
    if name == "class-token rows":
        added_mib = memory[name] - memory[reference]
        return reference, f"{100 / speed - 100:+.1f} %", f"{added_mib:+.0f} MiB"
    saving = memory[reference] / max(memory[name], 1)
    return reference, f"{speed:.2f}x as fast", f"{saving:.1f}x less"


def _prepare(work: Callable[[nn.Module, Tensor], object], size: int) -> Callable[[], object]:
    """Load the model, run the work once on a small image, and return the work itself."""
    torch.manual_seed(0)
    model = timm.create_model("vit_small_patch16_224", img_size=size, dynamic_img_size=True).eval()
    work(model, torch.rand(1, 3, 32, 32))
    gc.collect()
    return partial(work, model, torch.rand(1, 3, size, size))


def _plain(model: nn.Module, images: Tensor) -> Tensor:
    _fuse(model, True)
    with torch.no_grad():
        return model(images)


def _class_rows(model: nn.Module, images: Tensor) -> list[Map]:
    _fuse(model, True)
    with torch.no_grad(), capture(model, keep="rows") as maps:
        model(images)
    return [maps.map(layer) for layer in range(len(maps.layers))]


def _rollout(model: nn.Module, images: Tensor) -> Map:
    _fuse(model, True)
    with torch.no_grad(), capture(model) as maps:
        model(images)
    return rollout(maps)


def _eager_rollout(model: nn.Module, images: Tensor) -> Tensor:
    with torch.no_grad():
        weights, _ = _eager(model, images)
        product = torch.eye(weights[0].shape[-1])
        for alpha in weights:
            product = (0.5 * alpha.mean(1) + 0.5 * torch.eye(alpha.shape[-1])) @ product
    return product[:, 0, 1:]


def _gae(model: nn.Module, images: Tensor) -> Map:
    _fuse(model, True)
    return gae(model, images, 7)


def _eager_gae(model: nn.Module, images: Tensor) -> Tensor:
    weights, logits = _eager(model, images)
    gradients = torch.autograd.grad(logits[0, 7], weights)
    relevance = torch.eye(weights[0].shape[-1])
    for alpha, gradient in zip(weights, gradients, strict=True):
        relevance = relevance + (alpha.detach() * gradient).clamp(min=0).mean(1) @ relevance
    return relevance[:, 0, 1:]


def _eager(model: nn.Module, images: Tensor) -> tuple[list[Tensor], Tensor]:
    """Return every attention matrix and the logits, as tools without a row chain get them: by hooks on the dropout."""
    _fuse(model, False)
    weights: list[Tensor] = []
    hooks = [
        b.attn.attn_drop.register_forward_hook(lambda m, a, output: weights.append(output))
        for b in model.blocks
    ]
    try:
        return weights, model(images)
    finally:
        for hook in hooks:
            hook.remove()


def _fuse(model: nn.Module, fused: bool) -> None:
    for block in model.blocks:
        block.attn.fused_attn = fused


def _curves(repeats: int) -> dict[str, Timing]:
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=64).eval()
    images = torch.rand(1, 3, 64, 64)
    heat = torch.rand(1, 4, 4)
    work = {
        "insertion": partial(insertion, model, images, heat),
        "deletion": partial(deletion, model, images, heat),
    }
    return measure(work, repeats=repeats, warmup=1)
