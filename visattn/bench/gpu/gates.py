"""Gates on a GPU: as they are, compiled, and timm's, against the bytes that must move."""

from collections.abc import Callable
from functools import partial

import torch
from timm.layers import create_attn
from torch import Tensor, nn

from visattn.bench.gpu.machine import Machine, Work
from visattn.bench.gpu.report import Check, Measurement
from visattn.blocks.catalog import create_block

SHAPE = (64, 256, 56, 56)
GATES = ("se", "eca", "cbam", "coord", "gc", "simam")
_TIMM = {"se": "se", "eca": "eca", "cbam": "cbam", "gc": "gc"}
# forward: read to pool, read, write; backward: read both to pool, read the gradient, write
_PASSES = 7


def checks(machine: Machine, shape: tuple[int, ...] = SHAPE) -> list[Check]:
    """The difference of each compiled gate from itself in float64."""
    results = []
    x = torch.randn(2, *shape[1:], device=machine.device)
    for name in GATES:
        block = create_block(name, shape[1]).to(machine.device).eval()
        with torch.no_grad():
            result = machine.compile(block)(x)
            reference = block.double()(x.double())
        difference = result.double() - reference
        error = (difference.norm() / reference.norm()).item()
        results.append(Check(f"{name}, compiled", f"{tuple(x.shape)}, float32", error, 1e-4))
    return results


def rows(machine: Machine, shape: tuple[int, ...] = SHAPE) -> list[Measurement]:
    """Forward and backward of every gate: compiled against plain and against timm's."""
    x = torch.randn(shape, device=machine.device, dtype=torch.bfloat16)
    x = x.to(memory_format=torch.channels_last).requires_grad_()
    floor = machine.floor(0, _PASSES * x.nbytes)
    results = []
    for name in GATES:
        times = machine.measure(_variants(name, x, machine))
        for reference in ("plain", "timm"):
            if reference not in times:
                continue
            results.append(
                Measurement(
                    name,
                    f"{shape}, bf16, channels_last",
                    "forward+backward, compiled",
                    times["compiled"],
                    against=reference,
                    reference=times[reference],
                    aim=1.0,
                    floor=floor,
                    share_aim=0.7,
                )
            )
    return results


def _variants(name: str, x: Tensor, machine: Machine) -> dict[str, Work]:
    """Forward and backward of a gate as it is, compiled, and of timm's."""
    channels = x.shape[1]
    block = _prepare(create_block(name, channels), machine)
    variants: dict[str, Work] = {
        "plain": partial(_run_both, block, x),
        "compiled": partial(_run_both, machine.compile(block), x),
    }
    if name in _TIMM:
        peer = _prepare(create_attn(_TIMM[name], channels), machine)
        variants["timm"] = partial(_run_both, peer, x)
    return variants


def _prepare(block: nn.Module, machine: Machine) -> nn.Module:
    block = block.to(machine.device, torch.bfloat16)
    return block.to(memory_format=torch.channels_last)


def _run_both(block: Callable[[Tensor], Tensor], x: Tensor) -> None:
    y = block(x)
    torch.autograd.grad(y, x, y.detach())
