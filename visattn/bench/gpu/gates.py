"""Gates on a GPU: as they are, compiled, and timm's, against the bytes that must move."""

from collections.abc import Callable
from functools import partial

import torch
from timm.layers import create_attn
from torch import Tensor, nn

from visattn.bench.gpu.machine import Machine
from visattn.bench.gpu.report import Check, Row
from visattn.blocks.catalog import create_block

SHAPE = (64, 256, 56, 56)
GATES = ("se", "eca", "cbam", "coord", "gc", "simam")
_TIMM = {"se": "se", "eca": "eca", "cbam": "cbam", "gc": "gc"}
_PASSES = (
    7  # forward: read to pool, read, write; backward: read both to pool, read the gradient, write
)


def checks(machine: Machine, shape: tuple[int, ...] = SHAPE) -> list[Check]:
    """Return the difference of each compiled gate from itself in float64."""
    found = []
    x = torch.randn(2, *shape[1:], device=machine.device)
    for name in GATES:
        block = create_block(name, shape[1]).to(machine.device).eval()
        with torch.no_grad():
            got = machine.compile(block)(x)
            wanted = block.double()(x.double())
        error = ((got.double() - wanted).norm() / wanted.norm()).item()
        found.append(Check(f"{name}, compiled", f"{tuple(x.shape)}, float32", error, 1e-4))
    return found


def rows(machine: Machine, shape: tuple[int, ...] = SHAPE) -> list[Row]:
    """Return forward and backward of every gate: compiled against plain and against timm's."""
    x = torch.randn(shape, device=machine.device, dtype=torch.bfloat16).to(
        memory_format=torch.channels_last
    )
    x.requires_grad_()
    floor = machine.floor(0, _PASSES * x.nbytes)
    at, found = f"{shape}, bf16, channels_last", []
    for name in GATES:
        block = _ready(create_block(name, shape[1]), machine)
        work = {"plain": block, "compiled": machine.compile(block)}
        if name in _TIMM:
            work["timm"] = _ready(create_attn(_TIMM[name], shape[1]), machine)
        times = machine.measure({key: partial(_both, module, x) for key, module in work.items()})
        common = (name, at, "forward+backward, compiled", times["compiled"])
        found += [
            Row(*common, key, times[key], 1.0, floor, 0.7)
            for key in ("plain", "timm")
            if key in times
        ]
    return found


def _ready(block: nn.Module, machine: Machine) -> nn.Module:
    return block.to(machine.device, torch.bfloat16, memory_format=torch.channels_last)


def _both(block: Callable[[Tensor], Tensor], x: Tensor) -> None:
    y = block(x)
    torch.autograd.grad(y, x, y.detach())
