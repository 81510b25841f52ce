"""Where a block can stand: find the modules of a network by a pattern or a rule."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import Tensor, nn

from visattn.names import suggest
from visattn.surgery.calls import walk
from visattn.tracing import ModuleCall

# A module that shrinks the area of its map by more is not one stage but holds several.
STAGE_SHRINKS_AT_MOST = 6


@dataclass(frozen=True)
class InsertionSite:
    """A module behind which a block can stand, and the map (B, C, H, W) it gives."""

    name: str
    feature_map: Tensor


def find_sites(root: ModuleCall, where: str) -> list[InsertionSite]:
    """Return a site for each module that `where` names; see `insert` for the rules."""
    named = [call for call in walk(root) if call.name]
    if where == "stages":
        chosen = find_stages(root)
    elif where == "blocks":
        chosen = find_blocks(root)
    elif where.startswith("after:"):
        class_name = where.removeprefix("after:")
        chosen = [call for call in named if type(call.module).__name__ == class_name]
    else:
        chosen = [call for call in named if _matches(call.name, where)]
    if not chosen:
        raise ValueError(f"where={where!r} matches no module that runs; {_hint(named, where)}")
    sites: dict[str, InsertionSite] = {}
    for call in chosen:
        site = _make_site(call)
        # A module may run several times; its first map counts.
        first = sites.setdefault(call.name, site)
        channels = [site.feature_map.shape[1] for site in (first, site)]
        if channels[0] != channels[1]:
            raise ValueError(
                f"module {call.name!r} runs with {channels[0]} and with {channels[1]} channels"
            )
    return list(sites.values())


def find_stages(root: ModuleCall) -> list[ModuleCall]:
    """Return the last unit at each resolution, in the order in which the model reaches them."""
    # Of the units at one resolution, the dict keeps the last.
    last = {_size(call): call for call in _find_units(root)}
    return list(last.values())


def find_blocks(root: ModuleCall) -> list[ModuleCall]:
    """Return the blocks of the stages: modules that are more than a chain of modules."""
    blocks: list[ModuleCall] = []
    for unit in _find_units(root):
        blocks += _split_chain(unit)
    # Where every block is a single layer, as in VGG, a block behind each would be too many.
    if any(_count_layers(block) > 1 for block in blocks):
        return blocks
    return find_stages(root)


def _find_units(root: ModuleCall) -> list[ModuleCall]:
    """Return the modules of the trunk that hold two convolutions or more.

    In a plain chain of layers there are none; then these are the layers at every resolution at
    which a convolution works.
    """
    trunk = []
    for call in _walk_trunk(root):
        if call.output_map is not None and _area(call.output_map) > 1:
            trunk.append(call)
    units = [call for call in trunk if _count_layers(call) > 1]
    # A deep stem is a Sequential of single layers: it counts only if there is nothing else.
    stages = [call for call in units if not _is_stem(call)]
    if stages:
        return stages
    if units:
        return units
    sizes = {_size(call) for call in trunk if _count_layers(call) > 0}
    return [call for call in trunk if _size(call) in sizes]


def _is_stem(call: ModuleCall) -> bool:
    """Tell whether a call is a Sequential whose layers hold no others that mix channels."""
    if type(call.module) is not nn.Sequential:
        return False
    return not any(_count_layers(inner) > 0 for inner in call.inner if inner.inner)


def _walk_trunk(call: ModuleCall) -> Iterator[ModuleCall]:
    """Yield the modules of the trunk in order; those that hold several stages are opened."""
    for inner in call.inner:
        if inner.inner and _holds_stages(inner):
            yield from _walk_trunk(inner)
        else:
            yield inner


def _holds_stages(call: ModuleCall) -> bool:
    """Tell whether a call shrinks its map more than a stage does, or gives no map."""
    if call.input_tensor is None or call.output_map is None:
        return True
    return _area(call.input_tensor) > STAGE_SHRINKS_AT_MOST * _area(call.output_map)


def _split_chain(call: ModuleCall) -> Iterator[ModuleCall]:
    """Yield the links of a chain of chains; a call that joins branches is one link."""
    steps = [step for step in call.inner if step.output_map is not None]
    links = [step for step in steps if _count_layers(step) > 1]
    is_container = len(steps) > 1 or type(call.module) is nn.Sequential
    if not links or not is_container or not _is_chain(call, steps):
        yield call
        return
    for link in links:
        yield from _split_chain(link)


def _is_chain(call: ModuleCall, steps: list[ModuleCall]) -> bool:
    """Tell whether each step takes what the one before it gives, from input to output.

    An addition in place between two steps changes the version, so it counts as a join.
    """
    version = call.input_version
    for step in steps:
        if step.input_version != version:
            return False
        version = step.output_version
    return version == call.output_version


def _count_layers(call: ModuleCall) -> int:
    """Count the layers that mix channels at the resolution of a call or above.

    Those of squeeze layers do not count: they work at 1 x 1.
    """
    area = math.inf if call.output_map is None else _area(call.output_map)
    calls = (call, *walk(call))
    return sum(_count_positions(inner) >= area for inner in calls)


def _count_positions(call: ModuleCall) -> int:
    """Count the positions at which a layer mixes channels; 0 for modules that are no such layer."""
    output = call.output_map
    if output is None:
        return 0
    if isinstance(call.module, nn.Conv2d):
        return _area(output)
    if isinstance(call.module, nn.Linear):
        return output.shape[1] * output.shape[2]  # (B, H, W, C)
    return 0


def _area(x: Tensor) -> int:
    """Return H W of a map (B, C, H, W), and 1 for any other tensor."""
    if x.ndim != 4:
        return 1
    return x.shape[2] * x.shape[3]


def _size(call: ModuleCall) -> tuple[int, ...]:
    """Return the (H, W) of the map a call gives."""
    if call.output_map is None:
        return ()
    return tuple(call.output_map.shape[2:])


def _make_site(call: ModuleCall) -> InsertionSite:
    """Make the site behind a call, or refuse one that gives no map."""
    if call.output_map is not None:
        return InsertionSite(call.name, call.output_map)
    tensor = call.output_tensor
    output = "no single tensor" if tensor is None else tuple(tensor.shape)
    raise ValueError(
        f"module {call.name!r} must give a map (B, C, H, W) for a block to follow it; "
        f"it gives {output}"
    )


def _matches(name: str, pattern: str) -> bool:
    """Match a dotted name with a pattern word by word: a star does not cross a dot."""
    words = name.split(".")
    patterns = pattern.split(".")
    if len(words) != len(patterns):
        return False
    return all(map(fnmatchcase, words, patterns))


def _hint(calls: list[ModuleCall], where: str) -> str:
    """Name what `where` may have meant: class names after "after:", else modules that give maps."""
    giving_maps = [call for call in calls if call.output_map is not None]
    if where.startswith("after:"):
        classes = {type(call.module).__name__ for call in giving_maps}
        return f"class: {suggest(where.removeprefix('after:'), sorted(classes))}"
    names = dict.fromkeys(call.name for call in giving_maps)
    return (
        f"{suggest(where, names)}; rules are 'stages', 'blocks', 'after:ClassName'; "
        "a pattern is matched word by word between dots"
    )
