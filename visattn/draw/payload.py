"""What the page stores of a layer: 8-bit maps, queries and keys in half precision, or the values of a gate."""

import torch
from torch import Tensor

from visattn.map import Lattice
from visattn.record.entry import Record

MOST_TOKENS_AS_MAPS = (
    400  # above it, queries and keys in half precision are smaller than the maps themselves
)
_TILE = 256


def layer_of(record: Record) -> tuple[dict, dict[str, Tensor]] | None:
    """Return the facts and the numbers (B, ...) of a layer, or None where nothing of it lies on a grid."""
    if record.q is None and record.alpha is None:
        raise ValueError(
            f"layer {record.name} holds single rows: a page needs capture(model, keep='qk') or 'maps'"
        )
    gate = _gate(record)
    if gate is not None:
        place = lattice(record.keys.lattice, gate.shape[2:])
        facts = {
            "form": "gate",
            "heads": gate.shape[1],
            "key_grid": list(gate.shape[2:]),
            "key_lattice": place,
        }
        parts = {"g": gate.float()}
    elif record.kind != "token" or record.grid is None or record.queries.grid is None:
        return None
    elif (form := _inner_product(record)) is not None:
        q, k = form
        facts = {
            **_sides(record),
            "form": "qk",
            "heads": q.shape[1],
            "key_heads": k.shape[1],
            "dim": q.shape[-1],
        }
        parts = {
            "q": q.half(),
            "k": k.half(),
            "m": record.apply_heads(_starts(record)[:, -1]).float(),
        }
    else:
        tables = {"groups": record.queries.index, "key_groups": record.keys.index}
        tables = {name: None if index is None else index.tolist() for name, index in tables.items()}
        facts = {**_sides(record), "form": "maps", "heads": record.heads, **tables}
        parts = _eight_bits(record)
    if not all(x.isfinite().all() for x in parts.values()):
        raise ValueError(f"layer {record.name} holds NaN or infinite values: nothing can be drawn")
    return {"name": record.name, **facts}, {name: x.detach().cpu() for name, x in parts.items()}


def _sides(record: Record) -> dict:
    queries, keys = record.queries, record.keys
    mine = {"tokens": queries.tokens, "prefix": queries.prefix, "grid": list(queries.grid)}
    places = {
        "lattice": lattice(queries.lattice, queries.grid),
        "key_lattice": lattice(keys.lattice, keys.grid),
    }
    return {
        **mine,
        "keys": keys.tokens,
        "key_prefix": keys.prefix,
        "key_grid": list(keys.grid),
        **places,
    }


def lattice(given: Lattice | None, grid: tuple[int, int]) -> list[float]:
    """Return where the patches lie, as the page reads it: the first one's center down and across, and both steps."""
    return list(given or Lattice.tiling(grid))


def _gate(record: Record) -> Tensor | None:
    """Return (B, heads, h, w) where there is no query to click: gates, learned queries, a lone class token."""
    if record.kind == "spatial":
        return record.alpha
    if record.kind == "channel":
        return None if record.energy is None else record.energy[:, None]
    if (
        record.kind != "token"
        or record.grid is None
        or (record.queries.grid is not None and not record.pool)
    ):
        return None
    return record.row(0)[..., record.prefix :].unflatten(-1, record.grid)


def _inner_product(record: Record) -> tuple[Tensor, Tensor] | None:
    """Return q', k' with weights = softmax(q' k'ᵀ), where that is what was computed and smaller than the maps."""
    similarity, normalize = record.pair
    plain = (
        record.alpha is None
        and record.bias is None
        and record.mask is None
        and record.keys.index is None
    )
    if (
        not plain
        or record.keys.tokens <= MOST_TOKENS_AS_MAPS
        or getattr(normalize, "kernel", "softmax") != "softmax"
    ):
        return None
    width = record.q.shape[-1]
    scale = width**-0.5 if record.scale is None else record.scale
    if similarity is None:
        return record.q.float() * scale, record.k.float()
    q, k, bias = similarity.dot_form(record.q * (scale * width**0.5), record.k)
    return (q.float(), k.float()) if bias is None else None


def _eight_bits(record: Record) -> dict[str, Tensor]:
    """Return parts a (B, H, G, Nq, Nk) and r (B, H, G, Nq, 2) with weights = r0 + a / 255 r1."""
    size = record.queries.tokens if record.queries.index is None else record.queries.index.shape[1]
    parts, ranges = [], []
    for start in range(0, size, _TILE):
        tile = record.rows(slice(start, start + _TILE)).detach().float()
        tile = tile.unflatten(0, (record.batch, -1)).transpose(1, 2)
        low = tile.amin(-1, keepdim=True).clamp_max(0)
        reach = tile.amax(-1, keepdim=True) - low
        parts.append(((tile - low) / reach.clamp_min(1e-30) * 255).round().to(torch.uint8))
        ranges.append(torch.cat([low, reach], -1))
    return {"a": torch.cat(parts, 3), "r": torch.cat(ranges, 3)}


def rollouts(records: list[Record]) -> Tensor:
    """Return (B, layers, starts, tokens): rollout from each layer down, from the class token (if any) and the mean row.

    All rows go through a layer's map together, so that it is formed once; the page does the same
    row by row.
    """
    rows = None
    for record in reversed(records):
        rows = _starts(record) if rows is None else torch.cat([_starts(record), rows], 1)
        through = 0
        for start in range(0, rows.shape[2], _TILE):
            part = slice(start, start + _TILE)
            through = through + rows[..., part] @ record.rows(part).float().mean(1)
        rows = (rows + through) / 2
    return rows.detach().unflatten(1, (len(records), -1)).cpu()


def _starts(record: Record) -> Tensor:
    """Return (B, starts, tokens): the class token where there is one, and the mean over patches."""
    queries, like = record.queries, record.q if record.alpha is None else record.alpha
    rows = torch.zeros(2, queries.tokens, device=like.device)
    rows[0, 0] = 1
    rows[1, queries.prefix :] = 1 / (queries.tokens - queries.prefix)
    return rows[0 if queries.prefix else 1 :].expand(record.batch, -1, -1)
