"""Whether the fused kernels can run on a device."""

import importlib.util
import os

import torch

CAPABILITY = (8, 0)


@torch.compiler.assume_constant_result
def unavailable(device: torch.device) -> str | None:
    """Return why the kernels cannot run on tensors of a device; None where they can."""
    is_interpreted = device.type == "cpu" and interpreted()
    if device.type != "cuda" and not is_interpreted:
        return f"the tensors are on {device.type}, the kernels run on CUDA"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if is_interpreted:
        return None
    if torch.version.hip:
        return "the kernels were written for CUDA, not for ROCm"
    capability = torch.cuda.get_device_capability(device)
    if capability < CAPABILITY:
        return "compute capability {}.{} is below {}.{}".format(*capability, *CAPABILITY)
    return None


def interpreted() -> bool:
    """Whether Triton's interpreter is on, which runs the kernels, slowly, on CPU tensors."""
    value = os.environ.get("TRITON_INTERPRET", "0")
    return value.lower() in ("1", "true", "on", "yes", "y")
