"""Build the blocks of the cases with random weights, and look at their maps."""

import torch
from block_cases import CASES

from visattn.blocks.catalog import create_block
from visattn.core.formula import Attend
from visattn.core.tap import Tap

FIRST = list({case.name: case for case in reversed(CASES)}.values())[::-1]


def seeded(block, seed=0):
    """Random values everywhere, so that a zero of the paper's initialization hides nothing."""
    generator, buffers = torch.Generator().manual_seed(seed), dict(block.named_buffers())
    for key, value in block.state_dict().items():
        if not value.is_floating_point() or (key in buffers and "running" not in key):
            continue
        noise = torch.randn(value.shape, generator=generator, dtype=torch.float64)
        noise = noise / value[0].numel() ** 0.5 if value.dim() > 1 else noise
        value.copy_(0.5 + noise.abs() if "running_var" in key else noise)
    return block


def build(case, dtype=torch.float32):
    return seeded(create_block(case.name, case.channels, **case.options).to(dtype))


def inputs(case, batch=2, height=7, width=11, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    height, width = case.only_size or (height, width)
    return [
        torch.randn(s, generator=generator).to(dtype)
        for s in case.shapes(batch, case.channels, height, width)
    ]


def seams(block):
    """The places where maps leave a block, by name."""
    return {
        name: module for name, module in block.named_modules() if isinstance(module, Tap | Attend)
    }


def call_with(seam, change, block, tensors):
    """Run `block` while `change` replaces what leaves `seam`."""
    handle = seam.register_forward_hook(lambda module, args, output: change(output))
    try:
        return block(*tensors)
    finally:
        handle.remove()


def recorded(block, tensors):
    """The output, and (kind, map) of every tap in the order in which they fire; (kind, None) for Attend."""
    maps = []

    def record(module, args, kwargs, output):
        layout = kwargs.get("layout")
        maps.append(
            (module.kind, output)
            if isinstance(module, Tap)
            else (getattr(layout, "kind", "token"), None)
        )

    handles = [
        seam.register_forward_hook(record, with_kwargs=True) for seam in seams(block).values()
    ]
    output = block(*tensors)
    for handle in handles:
        handle.remove()
    return output, maps


def assert_close(got, want, tolerance=1e-5):
    """Equal up to `tolerance` of the largest value."""
    torch.testing.assert_close(
        got, want, rtol=tolerance, atol=tolerance * max(1.0, want.abs().max().item())
    )
