"""Which module of a watched model is running: names for what is recorded."""

from collections.abc import Callable
from typing import Any

import torch
from timm.layers import DropPath, LayerScale, Mlp
from torch import nn

from visattn.tracing import CallTracer, ModuleCall

# layers that attend nothing: inside blocks they are not followed, which saves time
PLAIN_LAYERS = (
    nn.Linear,
    nn.LayerNorm,
    nn.Identity,
    nn.Dropout,
    nn.GELU,
    nn.ReLU,
    nn.Conv2d,
    nn.BatchNorm2d,
    Mlp,
    LayerScale,
    DropPath,
)


class Trace:
    """Follow the modules of a model pass by pass, until it is closed.

    Args:
        modules: (name, module) of all modules of the model.
        on_start: Called with the first call of a pass, which begins when a module that already ran
            is entered from outside again.
        on_exit: Called with a call when its module ends; what it returns, unless None, replaces the
            output.
        every: Follow the plain layers inside blocks too; it costs time.
    """

    def __init__(
        self,
        modules: list[tuple[str, nn.Module]],
        on_start: Callable[[ModuleCall], object],
        on_exit: Callable[[ModuleCall], Any],
        every: bool = False,
    ):
        self._on_start = on_start
        self._outermost_names: set[str] = set()  # what was called from outside in this pass
        for name, module in modules:
            if isinstance(module, torch.jit.ScriptModule):
                raise TypeError(
                    f"{name or 'the model'} is a TorchScript module, "
                    "which hides its attention calls"
                )
        followed = [
            (name, module)
            for name, module in modules
            if every or "." not in name or not isinstance(module, PLAIN_LAYERS)
        ]
        self._tracer = CallTracer(followed, self._enter, on_exit)

    @property
    def running(self) -> list[ModuleCall]:
        """The calls that have not returned, outermost first."""
        return self._tracer.running

    def close(self) -> None:
        """Remove every hook."""
        self._tracer.close()

    def _enter(self, call: ModuleCall, parent: ModuleCall | None) -> None:
        if parent is not None:
            return
        if not self._outermost_names or call.name in self._outermost_names:
            self._outermost_names = set()
            self._on_start(call)
        self._outermost_names.add(call.name)
