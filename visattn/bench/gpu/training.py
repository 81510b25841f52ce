"""Training steps on a GPU: the own ViT against timm's in the same loop."""

from collections.abc import Callable
from functools import partial

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visattn.bench.gpu.machine import Machine
from visattn.bench.gpu.report import Row
from visattn.models.presets import create_model

PAIRS = {
    "ViT-S/16": ("vit_small_patch16", "vit_small_patch16_224"),
    "ViT-B/16": ("vit_base_patch16", "vit_base_patch16_224"),
}


def rows(
    machine: Machine, pair: tuple[str, str], images: int = 256, pixels: int = 224
) -> list[Row]:
    """Return the time of a compiled step in bf16 autocast, own and timm's; the share of the roofline is the MFU."""
    models = {
        "own": create_model(pair[0], image_size=pixels),
        "timm": timm.create_model(pair[1], img_size=pixels),
    }
    batch = torch.rand(images, 3, pixels, pixels, device=machine.device)
    labels = torch.randint(1000, (images,), device=machine.device)
    steps = {
        name: _step(model.to(machine.device).train(), machine) for name, model in models.items()
    }
    times = machine.measure({name: partial(step, batch, labels) for name, step in steps.items()})
    floor = 3 * images * forward_flops(models["timm"], pixels) / machine.flops_per_ms
    at = f"{images} x {pixels} px, bf16 autocast, compiled"
    return [Row(pair[0], at, "training step", times["own"], "timm's", times["timm"], 1.0, floor)]


def forward_flops(vit: nn.Module, pixels: int) -> float:
    """Return the operations of the matrix products of one image: the weights' and the attention's."""
    tokens = vit.patch_embed.num_patches + vit.num_prefix_tokens
    weights = sum(
        p.numel() for name, p in vit.named_parameters() if p.ndim > 1 and "pos_embed" not in name
    )
    return 2 * tokens * weights + 4 * len(vit.blocks) * tokens**2 * vit.embed_dim


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
