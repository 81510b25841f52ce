"""Maps on a GPU: rollout by the row chain against whole N x N matrices."""

from functools import partial

import timm
import torch
from torch import Tensor, nn

from visattn.bench.gpu.machine import Machine
from visattn.bench.gpu.report import Check, Row
from visattn.bench.timing import Timing
from visattn.methods.rollout import rollout
from visattn.record.session import capture

MODEL = "vit_base_patch16_224"
PIXELS = 1024  # 4096 patches


def checks(machine: Machine, model: str = MODEL, pixels: int = 224) -> list[Check]:
    """Return the difference of the row chain from the product of whole matrices, both of this device."""
    network, images = _built(machine, model, pixels)
    got, wanted = chained(network, images), product(network, images)
    error = ((got - wanted).norm() / wanted.norm()).item()
    return [Check(f"rollout of {model}", f"{wanted.shape[1]} patches, float32", error, 1e-3)]


def rows(machine: Machine, model: str = MODEL, pixels: int = PIXELS) -> list[Row]:
    """Return time and extra memory of rollout, the forward pass included."""
    network, images = _built(machine, model, pixels)
    work = {"it": partial(chained, network, images), "matrices": partial(product, network, images)}
    times = machine.measure(work)
    memory = {name: (mib := machine.peak(function), mib, mib) for name, function in work.items()}
    at, against = f"{model}, {(pixels // 16) ** 2} patches, float32", "N x N matrices"
    spread, reference = (Timing(*memory[name]) for name in ("it", "matrices"))
    return [
        Row("rollout", at, "forward and map", times["it"], against, times["matrices"], 0.2),
        Row("rollout", at, "extra memory", spread, against, reference, 0.05, unit="MiB"),
    ]


def _built(machine: Machine, model: str, pixels: int) -> tuple[nn.Module, Tensor]:
    network = timm.create_model(model, img_size=pixels).to(machine.device).eval()
    return network, torch.rand(1, 3, pixels, pixels, device=machine.device)


@torch.no_grad()
def chained(network: nn.Module, images: Tensor) -> Tensor:
    with capture(network) as maps:
        network(images)
    return rollout(maps).values.flatten(1)


@torch.no_grad()
def product(network: nn.Module, images: Tensor) -> Tensor:
    """Return the same by matrices, as tools without a row chain do: every layer's weights kept, then multiplied."""
    weights: list[Tensor] = []
    fused = [block.attn.fused_attn for block in network.blocks]
    hooks = [
        block.attn.attn_drop.register_forward_hook(lambda m, a, output: weights.append(output))
        for block in network.blocks
    ]
    try:
        for block in network.blocks:
            block.attn.fused_attn = False
        network(images)
    finally:
        for hook, block, own in zip(hooks, network.blocks, fused, strict=True):
            hook.remove()
            block.attn.fused_attn = own
    identity = torch.eye(weights[0].shape[-1], device=images.device)
    total = identity
    for alpha in weights:
        total = (alpha.mean(1) + identity) / 2 @ total
    return total[:, 0, 1:]
