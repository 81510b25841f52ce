"""What the page stores of a layer: 8-bit maps, queries and keys in half precision, or a gate."""

from typing import NamedTuple

import torch
from torch import Tensor

from visattn.map import Lattice
from visattn.record.entry import Record
from visattn.record.space import Space

# above it, queries and keys in half precision are smaller than the maps themselves
MOST_TOKENS_AS_MAPS = 400
_TILE_ROWS = 256


class LayerPayload(NamedTuple):
    """What the page stores of a layer: facts as JSON, and arrays (B, ...) as bytes."""

    facts: dict
    arrays: dict[str, Tensor]

    @property
    def is_gate(self) -> bool:
        """Whether the layer has no query to click."""
        return self.facts["form"] == "gate"


def layer_of(record: Record, most_tokens_as_maps: int = MOST_TOKENS_AS_MAPS) -> LayerPayload | None:
    """Return what the page stores of a layer, or None where nothing of it lies on a grid."""
    if record.q is None and record.alpha is None:
        raise ValueError(
            f"layer {record.name} holds single rows: "
            "a page needs capture(model, keep='qk') or 'maps'"
        )
    layer = _payload_of(record, most_tokens_as_maps)
    if layer is None:
        return None
    if not all(array.isfinite().all() for array in layer.arrays.values()):
        raise ValueError(f"layer {record.name} holds NaN or infinite values: nothing can be drawn")
    arrays = {name: array.detach().cpu() for name, array in layer.arrays.items()}
    return LayerPayload({"name": record.name, **layer.facts}, arrays)


def _payload_of(record: Record, most_tokens_as_maps: int) -> LayerPayload | None:
    gate = _gate(record)
    if gate is not None:
        return _gate_payload(record, gate)
    if record.kind != "token" or record.grid is None or record.queries.grid is None:
        return None
    if record.keys.tokens > most_tokens_as_maps:
        form = _softmax_form(record)
        if form is not None:
            return _softmax_payload(record, *form)
    return _maps_payload(record)


def _gate_payload(record: Record, gate: Tensor) -> LayerPayload:
    grid = gate.shape[2:]
    facts = {
        "form": "gate",
        "heads": gate.shape[1],
        "key_grid": list(grid),
        "key_lattice": lattice(record.keys.lattice, grid),
    }
    return LayerPayload(facts, {"g": gate.float()})


def _softmax_payload(record: Record, q: Tensor, k: Tensor) -> LayerPayload:
    facts = {
        **_sides(record),
        "form": "qk",
        "heads": q.shape[1],
        "key_heads": k.shape[1],
        "dim": q.shape[-1],
    }
    # the mean row of every head, which the page would need all queries for
    mean_rows = record.apply_heads(_start_rows(record)[:, -1])
    return LayerPayload(facts, {"q": q.half(), "k": k.half(), "m": mean_rows.float()})


def _maps_payload(record: Record) -> LayerPayload:
    facts = {
        **_sides(record),
        "form": "maps",
        "heads": record.heads,
        "groups": _index_list(record.queries),
        "key_groups": _index_list(record.keys),
    }
    return LayerPayload(facts, _eight_bits(record))


def _index_list(space: Space) -> list | None:
    return None if space.index is None else space.index.tolist()


def _sides(record: Record) -> dict:
    """Return where queries and keys lie in the picture."""
    queries = record.queries
    keys = record.keys
    return {
        "tokens": queries.tokens,
        "prefix": queries.prefix,
        "grid": list(queries.grid),
        "lattice": lattice(queries.lattice, queries.grid),
        "keys": keys.tokens,
        "key_prefix": keys.prefix,
        "key_grid": list(keys.grid),
        "key_lattice": lattice(keys.lattice, keys.grid),
    }


def lattice(patches: Lattice | None, grid: tuple[int, int]) -> list[float]:
    """Return where the patches lie: the first one's center down and across, and both steps."""
    return list(patches or Lattice.tiling(grid))


def _gate(record: Record) -> Tensor | None:
    """Return (B, heads, h, w) where there is no query to click.

    These are gates, learned queries and a lone class token.
    """
    if record.kind == "spatial":
        return record.alpha
    if record.kind == "channel":
        return None if record.energy is None else record.energy[:, None]
    if record.kind != "token" or record.grid is None:
        return None
    if record.queries.grid is not None and not record.pool:
        return None
    return record.row(0)[..., record.prefix :].unflatten(-1, record.grid)


def _softmax_form(record: Record) -> tuple[Tensor, Tensor] | None:
    """Return q', k' with weights = softmax(q' k'ᵀ), or None where the weights are no such softmax.

    Similarity and normalizer declare it: a subclass with a definition that differs has no form.
    """
    if any(x is not None for x in (record.alpha, record.bias, record.mask, record.keys.index)):
        return None
    similarity, normalize = record.pair
    if normalize is not None:
        softmax_form = normalize.softmax_form
        if softmax_form is None or not softmax_form.is_plain:
            return None
    # SDPA's scale; record.scale replaces it
    width = record.q.shape[-1]
    scale = width**-0.5 if record.scale is None else record.scale
    if similarity is None:
        return record.q.float() * scale, record.k.float()
    if not similarity.has_dot_form:
        return None
    # a similarity scales by itself, so that only the factor beyond 1 / sqrt(D) remains
    dtype = next((parameter.dtype for parameter in similarity.parameters()), record.q.dtype)
    q = record.q.to(dtype) * (scale * width**0.5)
    form = similarity.dot_form(q, record.k.to(dtype))
    if form is None:
        return None
    q, k, bias = form
    if bias is not None:
        return None
    return q.float(), k.float()


def _eight_bits(record: Record) -> dict[str, Tensor]:
    """Return a (B, H, G, Nq, Nk) and r (B, H, G, Nq, 2) with weights = r0 + a / 255 r1."""
    index = record.queries.index
    queries = record.queries.tokens if index is None else index.shape[1]
    bytes_of_tiles = []
    range_of_tiles = []
    for start in range(0, queries, _TILE_ROWS):
        # (B * G, H, rows, Nk) -> (B, H, G, rows, Nk)
        weights = record.rows(slice(start, start + _TILE_ROWS)).detach().float()
        weights = weights.unflatten(0, (record.batch, -1)).transpose(1, 2)
        low = weights.amin(-1, keepdim=True).clamp_max(0)
        reach = weights.amax(-1, keepdim=True) - low
        levels = (weights - low) / reach.clamp_min(1e-30) * 255
        bytes_of_tiles.append(levels.round().to(torch.uint8))
        range_of_tiles.append(torch.cat([low, reach], -1))
    return {"a": torch.cat(bytes_of_tiles, 3), "r": torch.cat(range_of_tiles, 3)}


def rollouts(records: list[Record]) -> Tensor:
    """Return (B, layers, starts, tokens): rollout from each layer down to the picture.

    The starts of a layer are the class token, if any, and the mean row. All rows go through a
    layer's map together, so that it is formed once; the page does the same row by row.
    """
    rows = torch.empty(0)
    for record in reversed(records):
        starts = _start_rows(record)
        # (B, starts, tokens): those of this layer, in front of those that came down to it
        rows = torch.cat([starts, rows], 1) if rows.numel() else starts
        attended = torch.zeros((), device=rows.device)
        for start in range(0, rows.shape[2], _TILE_ROWS):
            tile = slice(start, start + _TILE_ROWS)
            attended = attended + rows[..., tile] @ record.rows(tile).float().mean(1)
        rows = (rows + attended) / 2
    return rows.detach().unflatten(1, (len(records), -1)).cpu()


def _start_rows(record: Record) -> Tensor:
    """Return (B, starts, tokens): the class token where there is one, and the mean over patches."""
    queries = record.queries
    device = record.q.device if record.alpha is None else record.alpha.device
    rows = torch.zeros(2, queries.tokens, device=device)
    rows[0, 0] = 1
    rows[1, queries.prefix :] = 1 / (queries.tokens - queries.prefix)
    if not queries.prefix:
        rows = rows[1:]
    return rows.expand(record.batch, -1, -1)
