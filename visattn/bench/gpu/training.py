"""Training steps on a GPU: our ViT against timm's in the same loop."""

from collections.abc import Callable
from functools import partial
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visattn.bench.gpu.machine import Machine, Work
from visattn.bench.gpu.report import Measurement
from visattn.models.presets import create_model

PAIRS = {
    "ViT-S/16": ("vit_small_patch16", "vit_small_patch16_224"),
    "ViT-B/16": ("vit_base_patch16", "vit_base_patch16_224"),
}


def rows(
    machine: Machine, pair: tuple[str, str], images: int = 256, pixels: int = 224
) -> list[Measurement]:
    """The time of a compiled step in bf16 autocast, ours and timm's.

    The share of the roofline is the MFU.
    """
    name, timm_name = pair
    models: dict[str, nn.Module] = {
        "ours": create_model(name, image_size=pixels),
        "timm": timm.create_model(timm_name, img_size=pixels),
    }
    batch = torch.rand(images, 3, pixels, pixels, device=machine.device)
    labels = torch.randint(1000, (images,), device=machine.device)
    work: dict[str, Work] = {}
    for key, model in models.items():
        step = _step(model.to(machine.device).train(), machine)
        work[key] = partial(step, batch, labels)
    times = machine.measure(work)
    # the backward pass has twice the products of the forward pass
    flops = 3 * images * forward_flops(models["timm"], pixels)
    measurement = Measurement(
        name,
        f"{images} x {pixels} px, bf16 autocast, compiled",
        "training step",
        times["ours"],
        against="timm's",
        reference=times["timm"],
        aim=1.0,
        floor=flops / machine.flops_per_ms,
    )
    return [measurement]


def forward_flops(vit: Any, pixels: int) -> float:
    """Operations of the matrix products of one image: those of the weights and of attention."""
    tokens = vit.patch_embed.num_patches + vit.num_prefix_tokens
    num_weights = 0
    for name, parameter in vit.named_parameters():
        if parameter.ndim > 1 and "pos_embed" not in name:
            num_weights += parameter.numel()
    attention_products = 2 * len(vit.blocks) * tokens**2 * vit.embed_dim
    return 2 * (tokens * num_weights + attention_products)


def _step(model: nn.Module, machine: Machine) -> Callable[[Tensor, Tensor], None]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=machine.device.type == "cuda")
    forward = machine.compile(model)

    def step(batch: Tensor, labels: Tensor) -> None:
        with torch.autocast(machine.device.type, dtype=torch.bfloat16):
            loss = F.cross_entropy(forward(batch), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step
