"""The row chain: a row over all tokens goes down through the layers, one u A at a time, without an N x N matrix."""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from visattn.map import Map
from visattn.record.entry import Record
from visattn.record.session import Maps, device_of, mean_row
from visattn.record.space import Space

OUTLIER = 4.0  # standard deviations above the mean of the map
Step = Callable[[Record, Tensor], tuple[Tensor, Tensor]]


class EmptyMap(ValueError):
    """Every map of a batch is zero; ``heat`` holds them."""

    def __init__(self, heat: Map):
        super().__init__(
            f"{heat.method} gave a map of zeros at {heat.layer!r}: nothing there speaks for the target; "
            "choose other layers, another target or another method"
        )
        self.heat = heat


class Row(NamedTuple):
    """Weight of every token: (B, P) of prefix tokens and (B, h, w) of patches, on the finest grid met so far."""

    prefix: Tensor
    patches: Tensor

    @staticmethod
    def of(row: Tensor, space: Space) -> "Row":
        """Split (B, tokens) of a space that has a grid."""
        return Row(row[:, : space.prefix], row[:, space.prefix :].unflatten(1, space.grid))

    def on(self, space: Space) -> Tensor:
        """Return the row over the tokens of a space: (B, tokens)."""
        prefix = _widen(self.prefix, space.prefix)[:, : space.prefix]
        return (
            prefix
            if space.grid is None
            else torch.cat([prefix, spread(self.patches, space.grid).flatten(1)], 1)
        )

    def replaced(self, row: Tensor, space: Space) -> "Row":
        """Return this row with the tokens of a space replaced; tokens outside the space stay."""
        prefix = torch.cat([row[:, : space.prefix], self.prefix[:, space.prefix :]], 1)
        return Row(
            prefix,
            self.patches if space.grid is None else row[:, space.prefix :].unflatten(1, space.grid),
        )

    def plus(self, other: "Row") -> "Row":
        """Add another row on the finer of their grids."""
        count = max(self.prefix.shape[1], other.prefix.shape[1])
        finer = max(
            self.patches.shape[1:], other.patches.shape[1:], key=lambda grid: grid[0] * grid[1]
        )
        patches = spread(self.patches, finer) + spread(other.patches, finer)
        return Row(_widen(self.prefix, count) + _widen(other.prefix, count), patches)


def chain(records: list[Record], row: Row, step: Step) -> Row:
    """Send a row down through records, first to last of the model.

    ``step`` gives, for a record and a row u over its queries, what stays on the tokens and what
    moves to the keys.
    """
    for record in reversed(records):
        stays, moves = step(record, row.on(record.queries))
        row = row.replaced(stays, record.queries).plus(Row.of(moves, record.keys))
    return row


def opening(
    maps: Maps, records: list[Record], attend: Callable[[Record, Tensor], Tensor]
) -> tuple[Row, list[Record]]:
    """Return the row at the top and the records it goes down through.

    Layers whose queries are no tokens of the picture (attention pooling, glimpses) have no residual
    path to the
    picture: what they attended is the row at the top, averaged over them.
    """
    blind = next((record for record in records if record.grid is None), None)
    if blind is not None:
        raise ValueError(
            f"no grid was found behind the {blind.keys.tokens} keys of {blind.name!r}; pass grid="
        )
    pools = [record for record in records if record.pool]
    rest = [record for record in records if not record.pool]
    return (_pooled(pools, attend) if pools else start(maps, rest[-1])), rest


def spread(patches: Tensor, grid: tuple[int, int]) -> Tensor:
    """Share the mass of every patch (B, h, w) among its children on a finer grid, or sum it on a coarser one."""
    if tuple(patches.shape[1:]) == tuple(grid):
        return patches
    rows, columns = (
        _shares(old, new).to(patches) for old, new in zip(patches.shape[1:], grid, strict=True)
    )
    return rows.T @ patches @ columns


def finished(row: Row, records: list[Record], method: str, target=None, **notes) -> Map:
    """Cut the patches out of the last row, count the share that prefix tokens took, and flag outliers."""
    layer = records[0].name if len(records) == 1 else f"{records[0].name} to {records[-1].name}"
    prefix, patches = row.prefix.sum(1), row.patches.sum((1, 2))
    share = prefix / (prefix + patches).clamp(min=torch.finfo(patches.dtype).tiny)
    lattice = next(
        (r.keys.lattice for r in records if r.grid == tuple(row.patches.shape[1:])), None
    )
    return checked(
        Map(row.patches.float(), layer, method, target, share.float(), notes, lattice=lattice)
    )


def checked(heat: Map) -> Map:
    """Refuse values that are not finite and maps that are all zero; flag patches far above the others."""
    values = heat.values
    if not values.isfinite().all():
        raise ValueError(
            f"{heat.method} gave values that are not finite: look for NaN in the images or the weights"
        )
    empty = values.flatten(1).abs().amax(1) == 0
    if empty.all():
        raise EmptyMap(heat)
    if empty.any():
        heat.notes["all_zero"] = empty
    mean, deviation = (
        values.mean((1, 2), keepdim=True),
        values.std((1, 2), correction=0, keepdim=True),
    )
    heat.notes["outliers"] = values > mean + OUTLIER * deviation
    return heat


def start(maps: Maps, top: Record) -> Row:
    """Return the row of what the head reads at the top: the class token, or all patches alike."""
    row = mean_row(top.queries, top.batch, device_of(top))
    if maps.auto_query(top) == "cls":
        row = torch.zeros_like(row)
        row[:, 0] = 1
    prefix, patches, grid = (
        row[:, : top.queries.prefix],
        row[:, top.queries.prefix :],
        top.queries.grid,
    )
    return Row(
        prefix, row.new_zeros(top.batch, *top.grid) if grid is None else patches.unflatten(1, grid)
    )


def start_row(maps: Maps, record: Record) -> Tensor:
    """Return the row over a record's queries that one layer alone starts from."""
    return (
        mean_row(record.queries, record.batch, device_of(record))
        if record.pool
        else start(maps, record).on(record.queries)
    )


def _pooled(pools: list[Record], attend: Callable) -> Row:
    """Average what the learned queries, or the glimpses one after the other, attended."""
    rows = [Row.of(attend(r, mean_row(r.queries, r.batch, device_of(r))), r.keys) for r in pools]
    total = rows[0]
    for row in rows[1:]:
        total = total.plus(row)
    return Row(total.prefix / len(rows), total.patches / len(rows))


def _widen(prefix: Tensor, count: int) -> Tensor:
    return F.pad(prefix, (0, max(0, count - prefix.shape[1])))


def _shares(old: int, new: int) -> Tensor:
    """Return (old, new): the share of each old cell that each new cell gets; rows sum to one."""
    if new < old:
        back = _shares(new, old)
        return (back / back.sum(0)).T
    step = -(-new // old)
    if (
        -(-new // step) == old
    ):  # merging that pads the border: the last parent may have fewer children
        parents = F.one_hot(torch.arange(new) // step, old).T.double()
        return parents / parents.sum(1, keepdim=True)
    edges = torch.arange(new + 1, dtype=torch.double) * old / new
    low, high = edges[:-1], edges[1:]
    cells = torch.arange(old, dtype=torch.double)[:, None]
    return (torch.minimum(high, cells + 1) - torch.maximum(low, cells)).clamp(min=0)
