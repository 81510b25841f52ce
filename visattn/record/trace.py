"""Which module is running: names for what is seen."""

from dataclasses import dataclass

import torch
from timm.layers import DropPath, LayerScale, Mlp
from torch import Tensor, nn

PLAIN = (
    nn.Linear,
    nn.LayerNorm,
    nn.Identity,
    nn.Dropout,
    nn.GELU,
    nn.ReLU,
    nn.Conv2d,
    nn.BatchNorm2d,
)
PLAIN += (Mlp, LayerScale, DropPath)


@dataclass
class Frame:
    """One module call in progress."""

    name: str
    module: nn.Module
    args: tuple
    kwargs: dict
    outermost: bool = False

    @property
    def inputs(self) -> tuple:
        """Everything the module was called with."""
        return (*self.args, *self.kwargs.values())

    def tensor(self) -> Tensor | None:
        """Return the first floating tensor the module was called with."""
        return next(
            (x for x in self.inputs if isinstance(x, Tensor) and x.is_floating_point()), None
        )

    def grids(self) -> list[tuple[int, int]]:
        """Return the grids the inputs may lie on: (B, C, h, w), (B, h, w, C), or (h, w) told as an argument."""
        told = [
            x
            for x in self.inputs
            if isinstance(x, tuple) and len(x) == 2 and all(type(n) is int for n in x)
        ]
        x = self.tensor()
        if x is None or x.ndim != 4:
            return told
        return (
            [tuple(x.shape[2:4])]
            if self.outermost
            else [tuple(x.shape[2:4]), tuple(x.shape[1:3]), *told]
        )


def modules_of(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return what ``model.named_modules()`` gives, in less time than its generators within generators take."""
    found, seen, rest = [], set(), [("", model)]
    while rest:
        name, module = rest.pop()
        if module not in seen:
            seen.add(module)
            found.append((name, module))
            before = f"{name}." if name else ""
            inside = [(before + child, m) for child, m in module._modules.items() if m is not None]
            rest += reversed(inside)
    return found


class Trace:
    """Keep the stack of running modules by hooks; all of them go when it is closed.

    Args:
        modules: (name, module) of all modules of the model to follow.
        on_start: Called when a pass begins: a module that already ran is entered from outside
            again.
        on_exit: Called with (frame, output) when a module ends; what it returns, unless None, goes
            on in the output's place.
        every: Follow the plain layers inside blocks too, which attend nothing; it costs time.
    """

    def __init__(
        self, modules: list[tuple[str, nn.Module]], on_start, on_exit, every: bool = False
    ):
        self.frames: list[Frame] = []
        self._on_start, self._on_exit = on_start, on_exit
        self._entered: set[str] = set()
        self._handles = []
        for name, module in modules:
            if isinstance(module, torch.jit.ScriptModule):
                self.close()
                raise TypeError(
                    f"{name or 'the model'} is a TorchScript module, which hides its attention calls"
                )
            if isinstance(module, PLAIN) and "." in name and not every:
                continue
            self._handles += [
                module.register_forward_pre_hook(self._enter(name), prepend=True, with_kwargs=True),
                module.register_forward_hook(self._leave, always_call=True),
            ]

    def close(self):
        """Remove every hook."""
        for handle in self._handles:
            handle.remove()
        self._handles, self.frames = [], []

    def _enter(self, name: str):
        def hook(module, args, kwargs):
            frame = Frame(name, module, args, kwargs, outermost=not self.frames)
            if frame.outermost:
                if not self._entered or name in self._entered:
                    self._entered = set()
                    self._on_start(frame)
                self._entered.add(name)
            self.frames.append(frame)

        return hook

    def _leave(self, module, args, output):
        # An exception skips the exits of inner modules: unwind to the module that ends.
        while self.frames:
            frame = self.frames.pop()
            if frame.module is module:
                return self._on_exit(frame, output)
        return None
