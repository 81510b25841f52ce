"""Maps on a GPU: rollout by the row chain against whole N x N matrices."""

from functools import partial
from typing import Any

import timm
import torch
from torch import Tensor, nn

from visattn.bench.gpu.machine import Machine, Work
from visattn.bench.gpu.report import Check, Measurement
from visattn.bench.timing import Timing
from visattn.methods.rollout import rollout
from visattn.record.session import capture

MODEL = "vit_base_patch16_224"
PIXELS = 1024  # 4096 patches


def checks(machine: Machine, model: str = MODEL, pixels: int = 224) -> list[Check]:
    """The difference of the row chain from the product of whole matrices, both on this device."""
    network, images = _build(machine, model, pixels)
    result = rollout_by_rows(network, images)
    reference = rollout_by_matrices(network, images)
    error = ((result - reference).norm() / reference.norm()).item()
    at = f"{reference.shape[1]} patches, float32"
    return [Check(f"rollout of {model}", at, error, 1e-3)]


def rows(machine: Machine, model: str = MODEL, pixels: int = PIXELS) -> list[Measurement]:
    """Time and extra memory of rollout, the forward pass included."""
    network, images = _build(machine, model, pixels)
    work: dict[str, Work] = {
        "rows": partial(rollout_by_rows, network, images),
        "matrices": partial(rollout_by_matrices, network, images),
    }
    times = machine.measure(work)
    memory = {}
    for name, function in work.items():
        mib = machine.peak(function)
        memory[name] = Timing(mib, mib, mib)
    at = f"{model}, {(pixels // 16) ** 2} patches, float32"
    return [
        Measurement(
            "rollout",
            at,
            "forward and map",
            times["rows"],
            against="N x N matrices",
            reference=times["matrices"],
            aim=0.2,
        ),
        Measurement(
            "rollout",
            at,
            "extra memory",
            memory["rows"],
            against="N x N matrices",
            reference=memory["matrices"],
            aim=0.05,
            unit="MiB",
        ),
    ]


def _build(machine: Machine, model: str, pixels: int) -> tuple[nn.Module, Tensor]:
    network = timm.create_model(model, img_size=pixels)
    network = network.to(machine.device).eval()
    images = torch.rand(1, 3, pixels, pixels, device=machine.device)
    return network, images


@torch.no_grad()
def rollout_by_rows(network: nn.Module, images: Tensor) -> Tensor:
    """The map (B, N) by the row chain."""
    with capture(network) as maps:
        network(images)
    return rollout(maps).values.flatten(1)


@torch.no_grad()
def rollout_by_matrices(network: nn.Module, images: Tensor) -> Tensor:
    """The map (B, N) by matrices: the weights of every layer are stored, then multiplied.

    Tools without a row chain do so.
    """
    blocks: Any = network.blocks  # of a ViT of timm
    weights: list[Tensor] = []

    def store(module: nn.Module, inputs: tuple, output: Tensor) -> None:
        weights.append(output)

    was_fused = [block.attn.fused_attn for block in blocks]
    hooks = [block.attn.attn_drop.register_forward_hook(store) for block in blocks]
    try:
        for block in blocks:
            block.attn.fused_attn = False
        network(images)
    finally:
        for hook, block, fused in zip(hooks, blocks, was_fused, strict=True):
            hook.remove()
            block.attn.fused_attn = fused
    identity = torch.eye(weights[0].shape[-1], device=images.device)
    total = identity
    for alpha in weights:
        # (B, H, N, N) -> (B, N, N)
        total = (alpha.mean(1) + identity) / 2 @ total
    return total[:, 0, 1:]  # from the class token to the patches
