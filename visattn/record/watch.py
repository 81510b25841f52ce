"""Watch a model run and make a Record of every attention call, whoever wrote the model."""

import math
from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor, nn

from visattn.core.formula import Attend
from visattn.core.tap import Tap
from visattn.map import Lattice
from visattn.record.calls import Calls
from visattn.record.entry import Record
from visattn.record.space import (
    Space,
    grids_of,
    kernel_spaces,
    known_space,
    nearest_space,
    space_by_aspect,
    windowed_space,
)
from visattn.record.trace import Trace
from visattn.tracing import ModuleCall, modules_of

POOLED_BY_MEAN = ("avg", "avgmax", "max", "mean")


class Watch:
    """Follow one model: hand every attention call to ``on_record`` as a Record that still holds its graph.

    Args:
        model: Any module; it is not edited.
        on_record: Called with each Record.
        on_start: Called when a new pass through the model begins.
        grid: (h, w) of the patches, where it cannot be found.
        prefix: Number of prefix tokens, where it cannot be found.
        on_exit: Called with (frame, output) when any module ends; what it returns, unless None,
            goes on in the output's place.
    """

    def __init__(
        self,
        model: nn.Module,
        on_record: Callable,
        on_start: Callable,
        *,
        grid: tuple[int, int] | None = None,
        prefix: int | None = None,
        on_exit: Callable | None = None,
    ):
        self.model = model
        self.batch, self.image_size = 0, None
        self.seen: Counter = Counter()
        self._on_record, self._on_start, self._on_exit = on_record, on_start, on_exit
        self._grid, self._prefix = grid, prefix
        self.grids: list[tuple[int, int]] = []
        self._lattices: dict[tuple[int, int], Lattice] = {}
        self._shifted: dict[tuple[int, int], Lattice] = {}  # those that do not tile the image
        self._queries = 0
        self._modules = modules_of(model)
        self._items = {
            f"{name}.{child}" if name else child
            for name, module in self._modules
            if isinstance(module, (nn.ModuleList, nn.Sequential))
            for child in module._modules
        }

    def __enter__(self):
        self._trace = Trace(self._modules, self._start, self._exit, every=self._on_exit is not None)
        self._mode = Calls(self)
        self._mode.__enter__()
        return self

    def __exit__(self, *error):
        self._mode.__exit__(*error)
        self._trace.close()

    def mean_pooled(self) -> bool:
        """Whether the model says that it averages its patches, whatever tokens stand before them."""
        return any(
            getattr(self.model, name, None) in POOLED_BY_MEAN for name in ("global_pool", "pool")
        )

    def listening(self) -> bool:
        return bool(self._trace.running)

    def convolved(self, output: Tensor):
        self.grids.append(tuple(output.shape[-2:]))

    def strided(self, input: Tensor, output: Tensor, kernel, stride, padding):
        before, grid = (tuple(x.shape[-2:]) for x in (input, output))
        # The first way to a grid is the one that is followed, not the shortcut beside it.
        if before in self._lattices and grid not in self._lattices:
            lattice = self._lattices[grid] = self._lattices[before].through(kernel, stride, padding)
            if not lattice.tiles(grid):
                self._shifted[grid] = lattice

    def lattice_of(self, grid: tuple[int, int] | None) -> Lattice | None:
        """Return where the patches of a grid lie, or None where they tile the image or nothing is known of them."""
        return self._shifted.get(grid)

    def fused(self, query: Tensor, key: Tensor, value: Tensor, output: Tensor, options: dict):
        if self._own_code():
            return
        q, k, v = (_four_axes(x) for x in (query, key, value))
        mask = options.get("attn_mask")
        if mask is not None and query.ndim != 4 and mask.ndim == query.ndim:
            mask = _four_axes(mask)
        if options.get("is_causal"):
            mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril()
        is_bool = mask is not None and mask.dtype == torch.bool
        self._token(
            (q.shape[0], q.shape[1], q.shape[2], k.shape[2]),
            {"q": q, "k": k, "v": v, "scale": options.get("scale"), "output": output}
            | {"mask" if is_bool else "bias": mask},
        )

    def eager(self, alpha: Tensor, heads: int | None):
        if self._own_code():
            return
        if not 3 <= alpha.ndim <= 5:
            self.seen[f"softmax of shape {tuple(alpha.shape)}"] += 1
            return
        if alpha.ndim == 3 and heads is None:
            heads = max(1, alpha.shape[0] // max(1, self.batch))
        four = _four_axes(alpha) if alpha.ndim > 3 else alpha.unflatten(0, (-1, heads))
        self._token(tuple(four.shape), {"alpha": four, "output": alpha}, certain=False)

    def _start(self, frame: ModuleCall):
        image = frame.input_tensor
        if image is None:
            raise ValueError(
                f"capture needs a tensor of images; {frame.name or 'the model'} was called without one"
            )
        self.batch = image.shape[0]
        self.image_size = tuple(image.shape[-2:]) if image.ndim == 4 else None
        self.grids, self._queries = [], 0
        self._lattices = (
            {self.image_size: Lattice.tiling(self.image_size)} if self.image_size else {}
        )
        self._shifted = {}
        self.seen.clear()
        self._on_start()

    def _exit(self, frame: ModuleCall):
        output = frame.output
        if isinstance(frame.module, Tap) and output is not None:
            self._gate(frame, output)
        elif isinstance(frame.module, Attend) and output is not None:
            self._attend(frame, output)
        return None if self._on_exit is None else self._on_exit(frame, output)

    def _owner(self) -> ModuleCall:
        return next(
            f for f in reversed(self._trace.running) if not isinstance(f.module, nn.Softmax)
        )

    def _own_code(self) -> bool:
        """Whether our own code calls: its attention is seen at Attend and Tap, and must not be seen twice."""
        return type(self._owner().module).__module__.startswith("visattn.")

    def _token(self, shape: tuple[int, int, int, int], found: dict, certain: bool = True):
        owner = self._owner()
        if _mixes_channels(owner, shape):
            queries = keys = Space(shape[3])
            kind, pool = "channel", False
        else:
            queries, keys, pool = self._spaces(shape)
            kind = "token"
        if not certain and kind == "token" and keys.grid is None:
            self.seen[f"softmax of shape {shape}"] += 1
            return
        self._record(owner, Record(owner.name, kind, self.batch, queries, keys, pool=pool, **found))

    def _attend(self, frame: ModuleCall, output: Tensor):
        names = ("q", "k", "v", "bias", "mask", "layout")
        found = dict(zip(names, frame.args, strict=False)) | frame.kwargs
        layout = found.pop("layout", None)
        shape = (*found["q"].shape[:3], found["k"].shape[2])
        queries, keys, pool = (
            self._spaces(shape) if layout is None else _own_spaces(layout, shape[3])
        )
        if layout is not None and hasattr(layout, "meets"):
            # An evaluation that knows the layout needs no mask of it; the definition does.
            found["mask"] = _join_masks(layout.meets(found["q"].device), found.get("mask"))
        pair = (frame.module.similarity, frame.module.normalize)
        parent = self._trace.running[-1] if self._trace.running else frame
        kind = getattr(layout, "kind", "token")
        record = Record(
            "", kind, self.batch, queries, keys, pair=pair, output=output, pool=pool, **found
        )
        self._record(parent, record)

    def _gate(self, frame: ModuleCall, alpha: Tensor):
        parent = self._trace.running[-1] if self._trace.running else frame
        kind, energy = frame.module.kind, None
        x = parent.input_tensor
        size = getattr(parent.module, "kernel_size", None)
        if (
            kind == "token"
            and x is not None
            and x.ndim == 4
            and isinstance(size, int)
            and alpha.shape[3] == size**2
        ):
            alpha, queries, keys = kernel_spaces(alpha, tuple(x.shape[2:]), size)
            pool = False
        elif kind == "token":
            queries, keys, pool = self._spaces((*alpha.shape[:3], alpha.shape[3]))
        else:
            grid = tuple(alpha.shape[-2:])
            queries = keys = Space(grid[0] * grid[1], 0, grid)
            pool = False
        if kind == "channel" and x is not None and x.ndim == 4 and x.shape[1] == alpha.shape[1]:
            energy = (x.detach().abs() * alpha.detach()).sum(1)
        record = Record(
            "", kind, self.batch, queries, keys, alpha=alpha, output=alpha, energy=energy, pool=pool
        )
        self._record(parent, record)

    def _record(self, owner: ModuleCall, record: Record):
        for side in ("queries", "keys"):
            space = getattr(record, side)
            lattice = self.lattice_of(space.grid)
            if lattice is not None:
                setattr(record, side, space._replace(lattice=lattice))
        record.name = owner.name or type(owner.module).__name__
        above = [f.name for f in self._trace.running if f is not owner and f.name in self._items]
        record.block = above[-1] if above else ""
        if record.kind == "token":
            self._queries = record.queries.tokens
        self._on_record(record)

    def _spaces(self, shape: tuple[int, int, int, int]) -> tuple[Space, Space, bool]:
        batch, _, nq, nk = shape
        groups = batch // max(1, self.batch)
        if groups > 1:
            space = windowed_space(self._trace.running, groups, nk) if nq == nk else None
            if space is None:
                space = Space(groups * nk, index=torch.arange(groups * nk).view(groups, nk))
            return space, space, False
        keys = self.space_of(nk, guess=nq in (1, nk))
        if nq == nk:
            return keys, keys, False
        if nq == keys.prefix and self._queries != nk:
            return (
                Space(nq, nq),
                keys,
                False,
            )  # class tokens attend: they are tokens of the picture, and stay
        queries = known_space(nq, self.grids, (keys.prefix,)) if nq > 1 else None
        return (Space(nq, nq), keys, True) if queries is None else (queries, keys, False)

    def space_of(self, tokens: int, guess: bool = True) -> Space:
        """Find the prefix and the grid behind a number of tokens; guessing goes by what is merely likely."""
        prefix, image = self._prefix, self.image_size
        if self._grid is not None:
            if math.prod(self._grid) > tokens:
                raise ValueError(
                    f"grid={self._grid} has more patches than the {tokens} tokens that attend"
                )
            return known_space(tokens, [self._grid], (tokens - math.prod(self._grid),))
        hint = getattr(self.model, "num_prefix_tokens", None)
        space = (
            known_space(tokens, self.grids, (hint, 0) if prefix is None else (prefix,))
            or known_space(tokens, self._grids_inside(), (prefix or 0,))
            or (known_space(tokens, [image], (prefix or 0,)) if image else None)
        )
        if space is None and guess:
            space = nearest_space(tokens, self.grids) if prefix is None else None
            guesses = (0, 1, 2, 5) if prefix is None else (prefix,)
            space = space or (space_by_aspect(tokens, image, guesses) if image else None)
        return space or Space(tokens, prefix or 0)

    def _grids_inside(self) -> list[tuple[int, int]]:
        return [grid for call in self._trace.running[1:] for grid in grids_of(call)]


def _join_masks(meets: Tensor | None, mask: Tensor | None) -> Tensor | None:
    if meets is None or mask is None:
        return mask if meets is None else meets
    if meets.shape[0] not in (1, mask.shape[0]):
        return mask  # per group and image already: the relation joined them
    return meets & mask


def _own_spaces(layout, keys: int) -> tuple[Space, Space, bool]:
    if layout.kind == "channel":
        return Space(keys), Space(keys), False
    tokens = math.prod(layout.grid)
    queries, keys = (
        Space(tokens, 0, layout.grid, index()) for index in (layout.token_index, layout.key_index)
    )
    return queries, keys, False


def _four_axes(x: Tensor) -> Tensor:
    return x.unsqueeze(1) if x.ndim == 3 else x.flatten(0, x.ndim - 4)


def _mixes_channels(frame: ModuleCall, shape: tuple[int, int, int, int]) -> bool:
    """Whether Nq x Nk is a map between the channels of a head (cross-covariance attention), not between tokens."""
    x, (_, heads, nq, nk) = frame.input_tensor, shape
    return x is not None and x.ndim == 3 and nq == nk != x.shape[1] and nq * heads == x.shape[2]
