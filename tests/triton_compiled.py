"""Compile the kernels for a GPU that need not be there.

The compiler refuses what the interpreter lets pass.
``python tests/triton_compiled.py`` prints, per kernel, what the compiler made of it, as JSON.
"""

import contextlib
import json
import sys

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction
from triton_cases import BFLOAT, CASES, Case, run_chain, run_kernels

NAMES = (
    "sigmoid_bfloat16",
    "sigmoid_row_bias",
    "entmax15_one_token",
    "entmax15_streamed",
    "entmax_learned",
)
COMPILED_CASES = [
    *(CASES[name] for name in NAMES),
    Case("relu", bias=(1, 3, 1, 37), mask=(2, 1, 5, 37)),
    Case("entmax15", (2, 3, 197, 197, 64, 64), dtype=BFLOAT),
]


class AbsentDriver:
    """The driver of a device of compute capability 9.0, of which only the target is read."""

    get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))
    get_current_device = staticmethod(lambda: 0)
    get_current_stream = staticmethod(lambda device: 0)
    get_device_interface = staticmethod(lambda: torch.cuda)


def compile_only(programs: list[dict]):
    """Return what replaces a launch: it compiles the kernel for its arguments and runs nothing."""

    def subscript(kernel, grid):
        def call(*arguments, **options):
            compiled = kernel.warmup(*arguments, grid=grid, **options)
            ptx = compiled.asm["ptx"]
            program = {
                "name": compiled.name,
                "shared": compiled.metadata.shared,
                "tensor_cores": "wgmma.mma_async" in ptx or "mma.sync" in ptx,
            }
            programs.append(program)

        return call

    return subscript


def report() -> list[dict]:
    from visattn.core import gpu

    programs: list[dict] = []
    driver.set_active(AbsentDriver())
    JITFunction.__getitem__ = compile_only(programs)
    gpu.unavailable = lambda device: None
    for case in COMPILED_CASES:
        run_kernels(case, "cpu")
    for name in ("softmax", "softmax_gradient"):
        run_chain(name, "cpu")
    return programs


if __name__ == "__main__":
    with contextlib.redirect_stdout(sys.stderr):
        programs = report()
    json.dump(programs, sys.stdout)
