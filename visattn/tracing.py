"""Run a model for observation: follow the calls of its modules, and restore their modes."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put every module of a model in evaluation mode, then restore the mode of each.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Dropout(), torch.nn.BatchNorm2d(3).eval())
        >>> with evaluating(model):
        ...     print([module.training for module in model])
        [False, False]
        >>> [module.training for module in model]
        [True, False]
    """
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        # Not train(): a model may hold frozen layers, whose mode differs from their parent's.
        for module, mode in modes:
            module.training = mode


@dataclass(eq=False)
class ModuleCall:
    """One call of one module.

    Args:
        name: Path of the module in its model.
        module: What was called.
        args, kwargs: What it was called with.
        output: What it returned; None until then, and where it raised.
        inner: The calls inside it, where the listener of a tracer lists them.
        input_version, output_version: Identities of the two tensors and of their values, where the
            listener sets them.
    """

    name: str
    module: nn.Module
    args: tuple = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    output: Any = None
    inner: list["ModuleCall"] = field(default_factory=list)
    input_version: tuple[int, int] | None = None
    output_version: tuple[int, int] | None = None

    @property
    def inputs(self) -> tuple:
        """Everything the module was called with."""
        return (*self.args, *self.kwargs.values())

    @property
    def input_tensor(self) -> Tensor | None:
        """The first floating-point tensor the module was called with."""
        for value in self.inputs:
            if isinstance(value, Tensor) and value.is_floating_point():
                return value
        return None

    @property
    def output_tensor(self) -> Tensor | None:
        """The output, if it is a single tensor."""
        return self.output if isinstance(self.output, Tensor) else None

    @property
    def output_map(self) -> Tensor | None:
        """The output, if it is a map (B, C, H, W)."""
        output = self.output_tensor
        if output is None or output.ndim != 4:
            return None
        return output


class CallTracer:
    """Follow the calls of modules by hooks, which are gone after ``close()``.

    Args:
        modules: (name, module) of the modules to follow.
        on_enter: Called with (call, parent) before a module runs; the parent is the followed call
            around it, or None.
        on_exit: Called with the call when the module ends, by an exception too. What it returns,
            unless None, replaces the output.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.ReLU())
        >>> tracer = CallTracer(
        ...     modules_of(model), lambda call, parent: None, lambda call: print(repr(call.name))
        ... )
        >>> output = model(torch.rand(1, 2))
        '0'
        '1'
        ''
        >>> tracer.close()
    """

    def __init__(
        self,
        modules: Iterable[tuple[str, nn.Module]],
        on_enter: Callable[[ModuleCall, ModuleCall | None], object],
        on_exit: Callable[[ModuleCall], Any],
    ):
        self.running: list[ModuleCall] = []
        self.handles: list[RemovableHandle] = []
        self._on_enter = on_enter
        self._on_exit = on_exit
        for name, module in modules:
            before = module.register_forward_pre_hook(
                self._entry_hook(name), prepend=True, with_kwargs=True
            )
            # Called after an exception as well, so that the stack holds what runs and no more.
            after = module.register_forward_hook(self._leave, always_call=True)
            self.handles += [before, after]

    def close(self) -> None:
        """Remove every hook."""
        for handle in self.handles:
            handle.remove()
        self.handles = []
        self.running = []

    def _entry_hook(self, name: str) -> Callable[[nn.Module, tuple, dict], None]:
        def enter(module: nn.Module, args: tuple, kwargs: dict) -> None:
            call = ModuleCall(name, module, args, kwargs)
            self._on_enter(call, self.running[-1] if self.running else None)
            self.running.append(call)

        return enter

    def _leave(self, module: nn.Module, args: tuple, output: Any) -> Any:
        # A module that raised before its hooks ran has no exit: unwind to the module that ends.
        while self.running:
            call = self.running.pop()
            if call.module is module:
                call.output = output
                return self._on_exit(call)
        return None


def modules_of(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return what ``model.named_modules()`` yields, without its generators within generators."""
    named: list[tuple[str, nn.Module]] = []
    visited: set[nn.Module] = set()
    waiting = [("", model)]
    while waiting:
        name, module = waiting.pop()
        if module in visited:
            continue
        visited.add(module)
        named.append((name, module))
        path = f"{name}." if name else ""
        children = [
            (path + key, child) for key, child in module._modules.items() if child is not None
        ]
        waiting += reversed(children)
    return named
