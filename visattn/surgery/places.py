"""Where a block can stand: one dry run sees every feature map, and `find` picks modules by pattern or by rule."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from difflib import get_close_matches
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn


@dataclass(eq=False)
class Call:
    """One call of one module: the map it took, the map it gave (None where that is no tensor), the calls inside it."""

    name: str
    module: nn.Module
    taken: Tensor | None = None
    given: Tensor | None = None
    stamps: list[tuple[int, int] | None] = field(default_factory=list)
    inside: list["Call"] = field(default_factory=list)

    @property
    def is_map(self) -> bool:
        """Whether what came out is (B, C, H, W)."""
        return self.given is not None and self.given.ndim == 4

    @property
    def size(self) -> tuple[int, int]:
        """The (H, W) of what came out."""
        return tuple(self.given.shape[2:])


def dry_run(model: nn.Module, example: Tensor | tuple[int, ...] | None = None) -> Call:
    """Run the model once in eval mode without gradients and return the tree of its calls."""
    example = _example(model, example)
    root = Call("", model)
    with _evaluating(model), _watched(model, root), torch.no_grad():
        try:
            model(example)
        except (RuntimeError, ValueError, TypeError, AssertionError, IndexError) as error:
            raise ValueError(
                f"the dry run of {type(model).__name__} on an input of {tuple(example.shape)} failed ({error}); "
                "pass example=, an input of the model or its shape"
            ) from error
    return root.inside[0]


def walk(call: Call) -> Iterator[Call]:
    """Every call inside a call, outermost first."""
    for inner in call.inside:
        yield inner
        yield from walk(inner)


def find(root: Call, where: str) -> dict[str, Tensor]:
    """The modules named by `where`, each with the map that it gave in its first call."""
    calls = [call for call in walk(root) if call.name]
    if where in ("stages", "blocks"):
        chosen = stages(root) if where == "stages" else blocks(root)
    elif where.startswith("after:"):
        kind = where.removeprefix("after:")
        chosen = [call for call in calls if type(call.module).__name__ == kind]
    else:
        chosen = [call for call in calls if _matches(call.name, where)]
    if not chosen:
        raise ValueError(
            f"where={where!r} matches no module that runs; {_candidates(calls, where)}"
        )
    return _maps(chosen)


def stages(root: Call) -> list[Call]:
    """The last unit at each resolution, in the order in which the model reaches them."""
    last = {call.size: call for call in _units(root)}
    return list(last.values())


def blocks(root: Call) -> list[Call]:
    """The units of the stages: residual blocks and their like, the parts that are more than chains of parts."""
    found = [block for unit in _units(root) for block in _links(unit)]
    return found if any(_depth(block) > 1 for block in found) else stages(root)


def _units(root: Call) -> list[Call]:
    """The parts of the trunk that hold two convolutions or more; in a plain chain of layers, the layers behind one."""
    spine = [call for call in _spine(root) if call.is_map and _area(call.given) > 1]
    units = [call for call in spine if _depth(call) > 1]
    sizes = {call.size for call in spine if _depth(call)}
    # A deep stem is a Sequential of single layers: it counts only where there is nothing else.
    return (
        [
            call
            for call in units
            if type(call.module) is not nn.Sequential
            or any(_depth(c) for c in call.inside if c.inside)
        ]
        or units
        or [call for call in spine if call.size in sizes]
    )


def _spine(call: Call) -> Iterator[Call]:
    """The parts of the trunk one after another: what shrinks the map more than a stage does is opened."""
    for inner in call.inside:
        if inner.inside and (
            inner.taken is None or not inner.is_map or _area(inner.taken) > 6 * _area(inner.given)
        ):
            yield from _spine(inner)
        else:
            yield inner


def _links(call: Call) -> Iterator[Call]:
    """The links of a chain of chains; a call that joins branches is one link."""
    inner = [step for step in call.inside if step.is_map]
    opens = len(inner) > 1 or type(call.module) is nn.Sequential
    if opens and _is_chain(call, inner) and any(_depth(step) > 1 for step in inner):
        for step in inner:
            if _depth(step) > 1:
                yield from _links(step)
    else:
        yield call


def _is_chain(call: Call, steps: list[Call]) -> bool:
    """Whether each step takes exactly what the one before gave, and the last gives what the call gives."""
    # Identity of the tensor and its version: an addition in place between two steps counts as a
    # join.
    at = [call.stamps[0], *(stamp for step in steps for stamp in step.stamps), call.stamps[-1]]
    return all(left == right for left, right in zip(at[::2], at[1::2], strict=True))


def _depth(call: Call) -> int:
    """How many layers mix channels at the resolution of a call or above; those of squeeze layers work at 1 x 1."""
    area = call.size[0] * call.size[1] if call.is_map else math.inf
    return sum(_mixed(inner) >= area for inner in (call, *walk(call)))


def _mixed(call: Call) -> int:
    """At how many positions a convolution, or a linear layer on (B, H, W, C), works; 0 for other modules."""
    if isinstance(call.module, nn.Conv2d) and call.is_map:
        return _area(call.given)
    if isinstance(call.module, nn.Linear) and call.is_map:
        return call.given.shape[1] * call.given.shape[2]
    return 0


def _area(x: Tensor) -> int:
    return x.shape[-2] * x.shape[-1] if x.ndim == 4 else 1


def _maps(chosen: list[Call]) -> dict[str, Tensor]:
    maps: dict[str, Tensor] = {}
    for call in chosen:
        if not call.is_map:
            got = "no single tensor" if call.given is None else tuple(call.given.shape)
            raise ValueError(
                f"module {call.name!r} must give a map (B, C, H, W) for a block to follow it; it gives {got}"
            )
        first, width = maps.setdefault(call.name, call.given).shape[1], call.given.shape[1]
        if first != width:
            raise ValueError(f"module {call.name!r} runs with {first} and with {width} channels")
    return maps


def _matches(name: str, pattern: str) -> bool:
    """Whether a dotted name fits a pattern part by part: a star does not cross a dot."""
    parts, patterns = name.split("."), pattern.split(".")
    return len(parts) == len(patterns) and all(map(fnmatchcase, parts, patterns))


def _candidates(calls: list[Call], where: str) -> str:
    """What could have been meant: class names after "after:", else the nearest names and some that give maps."""
    names = list(dict.fromkeys(call.name for call in calls if call.is_map))
    if where.startswith("after:"):
        return f"classes here: {', '.join(sorted({type(call.module).__name__ for call in calls if call.is_map}))}"
    near = get_close_matches(where, names, n=3, cutoff=0.5)
    shown = sorted(names, key=lambda name: name.count("."))[:12]
    rules = "rules are 'stages', 'blocks', 'after:ClassName'; a pattern is matched part by part between dots"
    hint = f"did you mean {' or '.join(map(repr, near))}? " if near else ""
    return f"{hint}candidates: {', '.join(shown)}{', ...' if len(names) > 12 else ''}; {rules}"


def _example(model: nn.Module, example: Tensor | tuple[int, ...] | None) -> Tensor:
    if isinstance(example, Tensor):
        return example
    weight = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(()))
    if example is None:
        first = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
        # 96 pixels leave 3 x 3 positions after the usual five halvings.
        example = (1, first.in_channels if first is not None else 3, 96, 96)
    return torch.zeros(tuple(example), dtype=weight.dtype, device=weight.device)


@contextmanager
def _evaluating(model: nn.Module):
    """Eval mode inside; every module's own mode again after."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def _watched(model: nn.Module, root: Call):
    """Hooks that grow the tree of calls under `root`; gone after."""
    names = {module: name for name, module in model.named_modules()}
    open_calls = [root]

    def enter(module, inputs):
        taken = next((x for x in inputs if isinstance(x, Tensor)), None)
        call = Call(names[module], module, taken=taken, stamps=[_stamp(taken)])
        open_calls[-1].inside.append(call)
        open_calls.append(call)

    def leave(module, inputs, output):
        call = open_calls.pop()
        call.given = output if isinstance(output, Tensor) else None
        call.stamps.append(_stamp(call.given))

    handles = [
        handle
        for module in names
        for handle in (module.register_forward_pre_hook(enter), module.register_forward_hook(leave))
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _stamp(x: Tensor | None) -> tuple[int, int] | None:
    return None if x is None else (id(x), x._version)
