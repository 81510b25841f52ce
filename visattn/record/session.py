"""capture(): see what a model attends, without editing it."""

import difflib
import sys
from collections import Counter
from contextlib import contextmanager, nullcontext
from weakref import WeakSet

import torch
from torch import Tensor, nn

from visattn.map import Map
from visattn.record.entry import Record
from visattn.record.keeping import check_repeatable, keep_parts, number
from visattn.record.watch import Watch

KEEP = ("qk", "rows", "maps", "graph")
_watched: WeakSet = WeakSet()


class Maps:
    r"""The attention calls of the latest pass through a model, in the order they ran.

    .. math::
        \alpha = f_{norm}(f_{sim}(Q, K))

    Args:
        model: The network that is watched.
        keep: What each record holds, as in `capture`.

    Raises:
        ValueError: No pass has run, or nothing was seen in it; a layer, head or query that does not
            exist.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 6, 4, 4), nn.Flatten())
        >>> with capture(model) as maps:
        ...     y = model(torch.rand(1, 3, 8, 12))
        >>> maps.layers  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ...
        ValueError: no attention was seen in Sequential: it ran no attention call; for a network
            without attention ...
    """

    def __init__(self, model: nn.Module, keep: str):
        self.keep, self.records = keep, []
        self._model, self._watch = type(model).__name__, None

    def __repr__(self) -> str:
        """Return a line for the model and one per layer, with the number that ``map`` takes."""
        numbered = [record for record in self.records if record.kind == "token"] or self.records
        lines = [f"Maps({self._model}, keep={self.keep!r}, layers={len(self.records)})"]
        for record in self.records:
            number = numbered.index(record) if record in numbered else "-"
            lines.append(f"{number:>4}  {record!r}")
        return "\n".join(lines)

    @property
    def layers(self) -> list[Record]:
        """The records: each has name, kind, heads, grid and prefix, and q and k or its weights."""
        if not self.records:
            raise ValueError(self._nothing())
        return self.records

    @property
    def tokens(self) -> list[Record]:
        """The layers in which tokens attend tokens."""
        return [record for record in self.layers if record.kind == "token"]

    @property
    def batch(self) -> int:
        """Number of images."""
        return self._watch.batch

    @property
    def image_size(self) -> tuple[int, int] | None:
        """(H, W) the model was given."""
        return self._watch.image_size

    @property
    def nbytes(self) -> int:
        """Bytes held by all records."""
        return sum(record.nbytes for record in self.layers)

    def layer(self, layer: int | str) -> Record:
        """Return one layer: a name, or a number among the token layers (among all, where none has tokens)."""
        if isinstance(layer, str):
            names = [record.name for record in self.layers]
            if layer in names:
                return self.layers[names.index(layer)]
            near = difflib.get_close_matches(layer, names, 1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise ValueError(f"layer {layer!r} does not exist; {hint}Layers: {', '.join(names)}")
        among = self.tokens or self.layers
        if not -len(among) <= layer < len(among):
            raise ValueError(
                f"layer {layer} does not exist; there are {len(among)}: {_numbered(among)}"
            )
        return among[layer]

    def select(self, layers=None) -> list[Record]:
        """Return the token layers asked for, first to last: None is all, or a slice, or a list of numbers and names."""
        if not self.tokens:
            kinds = ", ".join(sorted({record.kind for record in self.layers}))
            raise ValueError(
                f"this method needs attention between tokens; the model has {kinds} attention only: "
                "map(layer) of capture() shows a gate, method='gradcam' explains any network"
            )
        if layers is None or isinstance(layers, slice):
            chosen = self.tokens[layers or slice(None)]
        else:
            chosen = [
                self.layer(layer)
                for layer in ([layers] if isinstance(layers, (int, str)) else layers)
            ]
        if not chosen:
            among = f"{len(self.tokens)} token layers, {_numbered(self.tokens)}"
            raise ValueError(f"layers selects none of the {among}; got {layers!r}")
        gates = [record.name for record in chosen if record.kind != "token"]
        if gates:
            raise ValueError(
                f"this method needs attention between tokens; these are gates: {', '.join(gates)}"
            )
        return [record for record in self.tokens if record in chosen]

    def auto_query(self, record: Record) -> str:
        """Return "cls" where the model reads its class token, else "mean"."""
        if record.pool:
            return "mean"
        return "cls" if record.queries.prefix and not self._watch.mean_pooled() else "mean"

    def map(self, layer: int | str = -1, head: int | None = None, query="auto") -> Map:
        """Return what a query attends in one layer, as weights: prefix tokens and padding take the rest of the sum.

        Args:
            layer: A name, or a number among the token layers; -1 is the last.
            head: One head, or None for the mean over heads.
            query: "auto", "cls" (first token), "mean" (over the patches' queries), (y, x) of a
                patch, or its number.
        """
        record = self.layer(layer)
        if head is not None and not -record.heads <= head < record.heads:
            raise ValueError(
                f"head {head} does not exist; {record.name!r} has heads 0 to {record.heads - 1}"
            )
        if record.kind != "token":
            return _gate_map(record, head)
        if record.grid is None:
            raise ValueError(
                f"no grid was found behind the {record.keys.tokens} keys of {record.name!r}; pass grid="
            )
        rows = self._row(record, query)
        row = rows.mean(1) if head is None else rows[:, head]
        return picture(row, record.keys, layer=record.name, method="raw")

    def _row(self, record: Record, query) -> Tensor:
        query = self.auto_query(record) if isinstance(query, str) and query == "auto" else query
        if record.row_kept is not None and query == self.auto_query(record):
            return record.row_kept
        if query == "mean":
            return record.apply_heads(mean_row(record.queries, record.batch, device_of(record)))
        if query == "cls" and record.queries.prefix:
            return record.row(0)
        return record.row(record.queries.prefix + _patch(record, query))

    def _nothing(self) -> str:
        if self._watch is None or not self._watch.batch:
            return f"no image has been run through {self._model} inside capture()"
        seen = ", ".join(f"{count} x {what}" for what, count in self._watch.seen.items())
        return (
            f"no attention was seen in {self._model}: it ran {seen or 'no attention call'}; "
            "for a network without attention explain with method='gradcam'"
        )


@contextmanager
def capture(
    model: nn.Module,
    keep: str = "qk",
    *,
    grid: tuple[int, int] | None = None,
    prefix: int | None = None,
):
    """Record every attention call of a model while the block runs; all hooks are gone when it ends.

    Args:
        model: Any network; it is not edited, and its output does not change. A compiled model runs
            uncompiled inside.
        keep: "qk" keeps copies of queries and keys, so that any row can be had later; "rows" keeps
            the class token's row (the mean over queries, where there is no class token) and nothing
            else; "maps" keeps all weights. Where a model forms its weights itself, "qk" keeps
            those.
        grid: (h, w) of the patches, where it cannot be found.
        prefix: Number of class, register and distillation tokens, where it cannot be found.

    Yields:
        Maps of the latest pass through the model: a second pass replaces the first.

    Raises:
        ValueError: ``keep`` is unknown; or, from the pass, "rows" or "maps" of weights that
            training draws at random.
        RuntimeError: The model is being captured already.

    Example:
        >>> attention = nn.MultiheadAttention(6, 2, batch_first=True)
        >>> with capture(attention, grid=(2, 3)) as maps:
        ...     y = attention(*[torch.rand(1, 6, 6)] * 3)
        >>> maps.layers[0].heads, maps.map().values.shape
        (2, torch.Size([1, 2, 3]))
        >>> maps
        Maps(MultiheadAttention, keep='qk', layers=1)
           0  Record('MultiheadAttention', token, 2 heads, grid 2x3)
    """
    if keep not in KEEP[:3]:
        raise ValueError(f"keep must be one of {', '.join(KEEP[:3])}; got {keep!r}")
    with record_into(Maps(model, keep), model, grid=grid, prefix=prefix) as maps:
        yield maps


@contextmanager
def record_into(maps: Maps, model: nn.Module, *, grid=None, prefix=None, on_exit=None):
    """Fill ``maps`` from every pass through the model."""
    model = getattr(model, "_orig_mod", model)
    if model in _watched:
        raise RuntimeError("this model is being captured already; leave that capture() first")
    times: Counter = Counter()

    def start():
        maps.records = []
        times.clear()

    def keep(record: Record):
        check_repeatable(record, maps.keep)
        times[record.name] += 1
        number(maps.records, record, times[record.name])
        maps.records.append(record)
        keep_parts(record, maps)

    _watched.add(model)
    try:
        with (
            _uncompiled(),
            Watch(model, keep, start, grid=grid, prefix=prefix, on_exit=on_exit) as maps._watch,
        ):
            yield maps
    finally:
        _watched.discard(model)


def mean_row(space, batch: int, device) -> Tensor:
    """Return the row that weighs every patch alike, and every query where there are no patches."""
    row = torch.zeros(batch, space.tokens, device=device)
    row[:, space.prefix if space.grid else 0 :] = 1
    return row / row.sum(1, keepdim=True)


def device_of(record: Record):
    """Return where a record lies."""
    return next(x.device for x in (record.q, record.alpha, record.row_kept) if x is not None)


def picture(row: Tensor, space, **about) -> Map:
    """Cut the patches out of a row over all tokens: (B, tokens) to a Map of (B, h, w)."""
    mass = row[:, : space.prefix].sum(1) if space.prefix else row.new_zeros(len(row))
    values = row[:, space.prefix :].unflatten(1, space.grid).float()
    return Map(values, prefix_mass=mass, lattice=space.lattice, **about)


def _numbered(records: list[Record]) -> str:
    return ", ".join(f"{i} {record.name}" for i, record in enumerate(records))


def _patch(record: Record, query) -> int:
    grid = record.queries.grid
    if grid is None:
        count = record.queries.tokens
        if not isinstance(query, int) or not 0 <= query < count:
            raise ValueError(
                f"query must be 'mean' or 0 to {count - 1} in {record.name!r}; got {query!r}"
            )
        return query - record.queries.prefix
    if isinstance(query, int) and 0 <= query < grid[0] * grid[1]:
        return query
    if (
        isinstance(query, tuple)
        and len(query) == 2
        and 0 <= query[0] < grid[0]
        and 0 <= query[1] < grid[1]
    ):
        return query[0] * grid[1] + query[1]
    cls = "'cls', " if record.queries.prefix else ""
    raise ValueError(
        f"query must be 'auto', {cls}'mean', (y, x) within {grid}, or 0 to {grid[0] * grid[1] - 1}; got {query!r}"
    )


def _gate_map(record: Record, head: int | None) -> Map:
    if record.grid is None:
        raise ValueError(
            f"{record.name!r} mixes channels: its weights have no place in the picture"
        )
    alpha = record.alpha.float()
    if record.kind == "channel" and head is None and record.energy is not None:
        return Map(
            record.energy.float(),
            layer=record.name,
            method="gated energy",
            lattice=record.keys.lattice,
        )
    if record.kind == "branch":
        values = alpha[:, head].mean(1) if head is not None else alpha.flatten(3).mean(3)
    else:
        values = alpha.mean(1) if head is None else alpha[:, head]
    return Map(values, layer=record.name, method=record.kind, lattice=record.keys.lattice)


def _uncompiled():
    """Run compiled code as written, where torch's compiler is in use at all: compiled code calls no function to see."""
    if "torch._dynamo" not in sys.modules:
        return nullcontext()
    return torch.compiler.set_stance("force_eager")
