"""The calls of a network's modules, recorded in one dry run."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from visattn.tracing import CallTracer, ModuleCall, evaluating, modules_of

# 96 pixels leave 3 x 3 positions after five halvings, as most networks have.
EXAMPLE_SIZE = 96


def dry_run(
    model: nn.Module,
    example: Tensor | tuple[int, ...] | None = None,
) -> ModuleCall:
    """Run the model once in eval mode without gradients; return its call."""
    example = _make_example(model, example)
    root = ModuleCall("", model)
    with evaluating(model), _recording(model, root), torch.no_grad():
        try:
            model(example)
        except (RuntimeError, ValueError, TypeError, AssertionError, IndexError) as error:
            raise ValueError(
                f"the dry run of {type(model).__name__} on an input of {tuple(example.shape)} "
                f"failed ({error}); pass example=, an input of the model or its shape"
            ) from error
    return root.inner[0]


def walk(call: ModuleCall) -> Iterator[ModuleCall]:
    """Yield every call inside a call, outermost first."""
    for inner in call.inner:
        yield inner
        yield from walk(inner)


def _make_example(
    model: nn.Module,
    example: Tensor | tuple[int, ...] | None,
) -> Tensor:
    """Return the example, or zeros of its shape on the device and in the dtype of the weights."""
    if isinstance(example, Tensor):
        return example
    if example is None:
        example = (1, _count_input_channels(model), EXAMPLE_SIZE, EXAMPLE_SIZE)
    for parameter in model.parameters():
        if parameter.is_floating_point():
            return torch.zeros(example, dtype=parameter.dtype, device=parameter.device)
    return torch.zeros(example)


def _count_input_channels(model: nn.Module) -> int:
    """Return the input channels of the first convolution; 3 where there is none."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            return module.in_channels
    return 3


@contextmanager
def _recording(
    model: nn.Module,
    root: ModuleCall,
) -> Iterator[None]:
    """Append the tree of calls to `root` by hooks, which are removed at the end."""

    def enter(call: ModuleCall, parent: ModuleCall | None) -> None:
        call.input_version = _version(call.input_tensor)
        (parent or root).inner.append(call)

    def leave(call: ModuleCall) -> None:
        call.output_version = _version(call.output_tensor)

    tracer = CallTracer(modules_of(model), enter, leave)
    try:
        yield
    finally:
        tracer.close()


def _version(x: Tensor | None) -> tuple[int, int] | None:
    """Identify a tensor and its values: torch counts the operations in place."""
    if x is None:
        return None
    return id(x), x._version
