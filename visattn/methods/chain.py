"""The row chain: a row over all tokens goes down the layers, one u A at a time.

No N x N matrix is formed: a map of all layers is a chain of vector-matrix products.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from visattn.map import Lattice, Map
from visattn.record.entry import Record
from visattn.record.session import Maps, device_of, mean_row
from visattn.record.space import Space

OUTLIER_DEVIATIONS = 4.0  # standard deviations above the mean of the map
Attend = Callable[[Record, Tensor], Tensor]
Step = Callable[[Record, Tensor], tuple[Tensor, Tensor]]


class EmptyMap(ValueError):
    """Every map of a batch is zero; ``heat`` holds them."""

    def __init__(self, heat: Map):
        super().__init__(
            f"{heat.method} computed a map of zeros at {heat.layer!r}: no patch has positive "
            "evidence for the target; choose other layers, another target or another method"
        )
        self.heat = heat


class TokenRow(NamedTuple):
    """Weight of every token: (B, P) of prefix tokens and (B, h, w) of patches.

    The patches lie on the finest grid that the row has met on its way down.
    """

    prefix: Tensor
    patches: Tensor

    @staticmethod
    def of(row: Tensor, space: Space) -> "TokenRow":
        """Split (B, tokens) of a space that has a grid."""
        return TokenRow(row[:, : space.prefix], _patches_of(row, space))

    def on(self, space: Space) -> Tensor:
        """Return the row over the tokens of a space: (B, tokens)."""
        prefix = _pad_prefix(self.prefix, space.prefix)[:, : space.prefix]
        if space.grid is None:
            return prefix
        patches = spread(self.patches, space.grid).flatten(1)  # (B, h, w) -> (B, h w)
        return torch.cat([prefix, patches], 1)

    def replaced(self, row: Tensor, space: Space) -> "TokenRow":
        """Return this row with the tokens of a space replaced; tokens outside the space stay."""
        inside = row[:, : space.prefix]
        outside = self.prefix[:, space.prefix :]
        prefix = torch.cat([inside, outside], 1)
        if space.grid is None:
            return TokenRow(prefix, self.patches)
        return TokenRow(prefix, _patches_of(row, space))

    def plus(self, row: "TokenRow") -> "TokenRow":
        """Add another row on the finer of their grids."""
        count = max(self.prefix.shape[1], row.prefix.shape[1])
        prefix = _pad_prefix(self.prefix, count) + _pad_prefix(row.prefix, count)
        finest = max(self.patches, row.patches, key=_count_patches)
        finer = finest.shape[1:]
        patches = spread(self.patches, finer) + spread(row.patches, finer)
        return TokenRow(prefix, patches)


def chain(
    records: list[Record],
    row: TokenRow,
    step: Step,
) -> TokenRow:
    """Send a row down through records, which stand first to last of the model.

    ``step`` returns, for a record and a row u over its queries, what stays on the tokens and what
    moves to the keys.
    """
    for record in reversed(records):
        stays, moves = step(record, row.on(record.queries))
        remaining = row.replaced(stays, record.queries)
        row = remaining.plus(TokenRow.of(moves, record.keys))
    return row


def opening(
    maps: Maps,
    records: list[Record],
    attend: Attend,
) -> tuple[TokenRow, list[Record]]:
    """Return the row at the top and the records it goes down through.

    Layers whose queries are no tokens of the picture (attention pooling, glimpses) have no residual
    path to the picture: what they attended is the row at the top, averaged over them.
    """
    for record in records:
        if record.grid is None:
            raise ValueError(
                f"no grid was found for the {record.keys.tokens} keys of {record.name!r}; "
                "pass grid="
            )
    pools = [record for record in records if record.pool]
    layers = [record for record in records if not record.pool]
    if pools:
        return _mean_of_pools(pools, attend), layers
    return start(maps, layers[-1]), layers


def spread(patches: Tensor, grid: tuple[int, ...]) -> Tensor:
    """Share the mass of each patch (B, h, w) among its children on a finer grid.

    On a coarser grid the mass of the children is summed.
    """
    if tuple(patches.shape[1:]) == tuple(grid):
        return patches
    _, height, width = patches.shape
    rows = _shares(height, grid[0]).to(patches)  # (h, h')
    columns = _shares(width, grid[1]).to(patches)  # (w, w')
    return rows.T @ patches @ columns  # (B, h, w) -> (B, h', w')


def finished(
    row: TokenRow,
    records: list[Record],
    method: str,
    target: Tensor | None = None,
    **notes: Tensor,
) -> Map:
    """Return the patches of the last row as a map, with the share that prefix tokens took."""
    # (B,): what arrived at either
    prefix = row.prefix.sum(1)
    patches = row.patches.sum((1, 2))
    total = prefix + patches
    smallest = torch.finfo(total.dtype).tiny
    prefix_mass = prefix / total.clamp(min=smallest)
    heat = Map(
        row.patches.float(),
        name_of_layers(records),
        method,
        target,
        prefix_mass.float(),
        notes,
        lattice=_lattice_of(records, tuple(row.patches.shape[1:])),
    )
    return checked(heat)


def name_of_layers(records: list[Record]) -> str:
    """Return the name of one layer, or of the first and the last of several."""
    if len(records) == 1:
        return records[0].name
    return f"{records[0].name} to {records[-1].name}"


def _lattice_of(records: list[Record], grid: tuple[int, ...]) -> Lattice | None:
    for record in records:
        if record.grid == grid:
            return record.keys.lattice
    return None


def checked(heat: Map) -> Map:
    """Refuse values that are not finite and maps that are all zero; flag outlier patches."""
    values = heat.values  # (B, h, w)
    if not values.isfinite().all():
        raise ValueError(
            f"{heat.method} computed values that are not finite: "
            "look for NaN in the images or the weights"
        )
    empty = values.flatten(1).abs().amax(1) == 0
    if empty.all():
        raise EmptyMap(heat)
    if empty.any():
        heat.notes["all_zero"] = empty
    mean = values.mean((1, 2), keepdim=True)
    deviation = values.std((1, 2), correction=0, keepdim=True)
    heat.notes["outliers"] = values > mean + OUTLIER_DEVIATIONS * deviation
    return heat


def start(maps: Maps, top: Record) -> TokenRow:
    """Return the row of what the head reads at the top: the class token, or all patches alike."""
    row = mean_row(top.queries, top.batch, device_of(top))
    if maps.auto_query(top) == "cls":
        row = torch.zeros_like(row)
        row[:, 0] = 1
    if top.queries.grid is not None:
        return TokenRow.of(row, top.queries)
    # queries without patches, such as a class token alone
    height, width = _grid_of(top)
    no_patches = row.new_zeros(top.batch, height, width)
    return TokenRow(row[:, : top.queries.prefix], no_patches)


def start_row(maps: Maps, record: Record) -> Tensor:
    """Return the row over a record's queries that one layer alone starts from."""
    if record.pool:
        return mean_row(record.queries, record.batch, device_of(record))
    return start(maps, record).on(record.queries)


def sum_of_rows(records: list[Record], row_of: Callable[[Record], Tensor]) -> TokenRow:
    """Add up one row over the keys of every layer; there is at least one."""
    first = records[0]
    total = TokenRow.of(row_of(first), first.keys)
    for record in records[1:]:
        total = total.plus(TokenRow.of(row_of(record), record.keys))
    return total


def _mean_of_pools(pools: list[Record], attend: Attend) -> TokenRow:
    """Average what the learned queries, or the glimpses one after the other, attended."""

    def attended(record: Record) -> Tensor:
        row = mean_row(record.queries, record.batch, device_of(record))
        return attend(record, row)

    total = sum_of_rows(pools, attended)
    count = len(pools)
    return TokenRow(total.prefix / count, total.patches / count)


def _count_patches(patches: Tensor) -> int:
    _, height, width = patches.shape
    return height * width


def _patches_of(row: Tensor, space: Space) -> Tensor:
    """Return the patches of a row: (B, tokens) -> (B, h, w)."""
    if space.grid is None:
        raise ValueError(f"the {space.tokens} tokens of a row must lie on a grid")
    return row[:, space.prefix :].unflatten(1, space.grid)


def _grid_of(record: Record) -> tuple[int, int]:
    if record.grid is None:
        raise ValueError(f"the keys of {record.name!r} must lie on a grid")
    return record.grid


def _pad_prefix(prefix: Tensor, count: int) -> Tensor:
    """Append zeros to (B, P) up to ``count`` prefix tokens."""
    missing = max(0, count - prefix.shape[1])
    return F.pad(prefix, (0, missing))


def _shares(cells: int, finer: int) -> Tensor:
    """Return (cells, finer): the share of each cell that each finer cell gets; rows sum to one."""
    if finer < cells:
        children = _shares(finer, cells)
        return (children / children.sum(0)).T
    step = -(-finer // cells)
    if -(-finer // step) == cells:
        # merging that pads the border: the last parent may have fewer children
        parent_numbers = torch.arange(finer) // step
        children = F.one_hot(parent_numbers, cells).T.double()  # (cells, finer)
        return children / children.sum(1, keepdim=True)
    # cells that do not nest share by the length of their overlap
    edges = torch.arange(finer + 1, dtype=torch.double) * cells / finer
    starts = torch.arange(cells, dtype=torch.double)[:, None]  # (cells, 1)
    first = torch.maximum(edges[:-1], starts)
    last = torch.minimum(edges[1:], starts + 1)
    return (last - first).clamp(min=0)
