"""Compile the kernels for a GPU that need not be there: the compiler refuses what the interpreter lets pass.

``python tests/triton_compiled.py`` prints, per kernel, what the compiler made of it, as JSON.
"""

import contextlib
import json
import sys

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction
from triton_cases import BFLOAT, CASES, CHAINS, Case, by_kernels, chain_error

NAMES = (
    "sigmoid_bfloat16",
    "sigmoid_row_bias",
    "entmax15_one_token",
    "entmax15_streamed",
    "entmax_learned",
)
CHOSEN = [
    *(CASES[name] for name in NAMES),
    Case("relu", bias=(1, 3, 1, 37), mask=(2, 1, 5, 37)),
    Case("entmax15", (2, 3, 197, 197, 64, 64), dtype=BFLOAT),
]


class Absent:
    """The driver of a device of compute capability 9.0 that is asked for nothing but its kind."""

    get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))
    get_current_device = staticmethod(lambda: 0)
    get_current_stream = staticmethod(lambda device: 0)
    get_device_interface = staticmethod(lambda: torch.cuda)


def compile_only(found: list[dict]):
    """Return what takes the place of a launch: the kernel is compiled for its arguments, and nothing runs."""

    def subscript(kernel, grid):
        def call(*arguments, **options):
            made = kernel.warmup(*arguments, grid=grid, **options)
            products = any(word in made.asm["ptx"] for word in ("wgmma.mma_async", "mma.sync"))
            found.append(
                {"name": made.name, "shared": made.metadata.shared, "tensor_cores": products}
            )

        return call

    return subscript


def report() -> list[dict]:
    from visattn.core import gpu

    found: list[dict] = []
    driver.set_active(Absent())
    JITFunction.__getitem__ = compile_only(found)
    gpu.unavailable = lambda device: None
    for case in CHOSEN:
        by_kernels(case, "cpu")
    for name in ("softmax", "softmax_gradient"):
        chain_error(CHAINS[name], "cpu", "gradient" in name)
    return found


if __name__ == "__main__":
    with contextlib.redirect_stdout(sys.stderr):
        compiled = report()
    json.dump(compiled, sys.stdout)
