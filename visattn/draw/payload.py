"""What the page stores of a layer: 8-bit maps, queries and keys in half precision, or a gate."""

from typing import NamedTuple

import torch
from torch import Tensor

from visattn.core.normalize.definition import Normalizer
from visattn.core.similarity.definition import Similarity
from visattn.map import Lattice
from visattn.record.entry import Record
from visattn.record.session import device_of
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
    arrays = {}
    for name, array in layer.arrays.items():
        if not array.isfinite().all():
            raise ValueError(
                f"layer {record.name} holds NaN or infinite values: nothing can be drawn"
            )
        arrays[name] = array.detach().cpu()
    facts = {"name": record.name, **layer.facts}
    return LayerPayload(facts, arrays)


def _payload_of(record: Record, most_tokens_as_maps: int) -> LayerPayload | None:
    gate = _gate(record)
    if gate is not None:
        return _gate_payload(record, gate)
    if record.kind != "token":
        return None
    if record.queries.grid is None or record.keys.grid is None:
        return None
    if record.keys.tokens > most_tokens_as_maps:
        form = _softmax_form(record)
        if form is not None:
            return _softmax_payload(record, *form)
    return _maps_payload(record)


def _gate_payload(record: Record, gate: Tensor) -> LayerPayload:
    _, _, height, width = gate.shape
    grid = (height, width)
    facts = {
        "form": "gate",
        "heads": gate.shape[1],
        "key_grid": list(grid),
        "key_lattice": lattice(record.keys.lattice, grid),
    }
    return LayerPayload(facts, {"g": gate.float()})


def _softmax_payload(
    record: Record,
    q: Tensor,
    k: Tensor,
) -> LayerPayload:
    facts = {
        **_sides(record),
        "form": "qk",
        "heads": q.shape[1],
        "key_heads": k.shape[1],
        "dim": q.shape[-1],
    }
    # the mean row of every head, which the page would need all queries for
    mean_rows = record.apply_heads(_start_rows(record)[:, -1])
    arrays = {
        "q": q.half(),
        "k": k.half(),
        "m": mean_rows.float(),
    }
    return LayerPayload(facts, arrays)


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
    if space.index is None:
        return None
    return space.index.tolist()


def _sides(record: Record) -> dict:
    """Return where queries and keys lie in the picture."""
    queries = record.queries
    keys = record.keys
    query_grid = _grid_of(queries)
    key_grid = _grid_of(keys)
    return {
        "tokens": queries.tokens,
        "prefix": queries.prefix,
        "grid": list(query_grid),
        "lattice": lattice(queries.lattice, query_grid),
        "keys": keys.tokens,
        "key_prefix": keys.prefix,
        "key_grid": list(key_grid),
        "key_lattice": lattice(keys.lattice, key_grid),
    }


def _grid_of(space: Space) -> tuple[int, int]:
    if space.grid is None:
        raise ValueError(f"the {space.tokens} tokens of a page's layer must lie on a grid")
    return space.grid


def lattice(patches: Lattice | None, grid: tuple[int, int]) -> list[float]:
    """Return where the patches lie: the first one's center down and across, and both steps."""
    if patches is None:
        patches = Lattice.tiling(grid)
    return list(patches)


def _gate(record: Record) -> Tensor | None:
    """Return (B, heads, h, w) where there is no query to click.

    These are gates, learned queries and a lone class token.
    """
    if record.kind == "spatial":
        return record.alpha
    if record.kind == "channel" and record.energy is not None:
        return record.energy[:, None]  # (B, h, w) -> (B, 1, h, w)
    if record.kind != "token" or record.grid is None:
        return None
    if record.queries.grid is not None and not record.pool:
        return None
    row = record.row(0)  # (B, H, keys)
    return row[..., record.prefix :].unflatten(-1, record.grid)


def _softmax_form(record: Record) -> tuple[Tensor, Tensor] | None:
    """Return q', k' with weights = softmax(q' k'ᵀ), or None where the weights are no such softmax.

    Similarity and normalizer declare it: a subclass with a definition that differs has no form.
    """
    q = record.q
    k = record.k
    if q is None or k is None or record.alpha is not None:
        return None
    if record.bias is not None or record.mask is not None:
        return None
    if record.keys.index is not None:
        return None
    similarity, normalize = record.pair
    if not _is_plain_softmax(normalize):
        return None
    # SDPA's scale; record.scale replaces it
    width = q.shape[-1]
    scale = record.scale
    if scale is None:
        scale = width**-0.5
    if similarity is None:
        return q.float() * scale, k.float()
    # a similarity scales by itself, so that only the factor beyond 1 / sqrt(D) remains
    return _dot_form(similarity, q, k, scale * width**0.5)


def _is_plain_softmax(normalize: Normalizer | None) -> bool:
    """Whether a normalizer declares that it is softmax and nothing else; None stands for it."""
    if normalize is None:
        return True
    form = normalize.softmax_form
    return form is not None and form.is_plain


def _dot_form(
    similarity: Similarity,
    q: Tensor,
    k: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor] | None:
    """Return q', k' whose inner products are the similarities, or None where there are none."""
    if not similarity.has_dot_form:
        return None
    dtype = q.dtype
    for parameter in similarity.parameters():
        dtype = parameter.dtype
        break
    scaled_q = q.to(dtype) * scale
    form = similarity.dot_form(scaled_q, k.to(dtype))
    if form is None:
        return None
    dot_q, dot_k, bias = form
    if bias is not None:
        return None
    return dot_q.float(), dot_k.float()


def _eight_bits(record: Record) -> dict[str, Tensor]:
    """Return a (B, H, G, Nq, Nk) and r (B, H, G, Nq, 2) with weights = r0 + a / 255 r1."""
    queries = record.queries.tokens
    if record.queries.index is not None:
        queries = record.queries.index.shape[1]  # of one group
    levels_of_tiles = []
    ranges_of_tiles = []
    for start in range(0, queries, _TILE_ROWS):
        weights = record.rows(slice(start, start + _TILE_ROWS))
        # (B * G, H, rows, Nk) -> (B, G, H, rows, Nk) -> (B, H, G, rows, Nk)
        weights = weights.detach().float()
        weights = weights.unflatten(0, (record.batch, -1)).transpose(1, 2)
        low = weights.amin(-1, keepdim=True).clamp_max(0)
        reach = weights.amax(-1, keepdim=True) - low
        levels = (weights - low) / reach.clamp_min(1e-30) * 255
        levels_of_tiles.append(levels.round().to(torch.uint8))
        ranges_of_tiles.append(torch.cat([low, reach], -1))
    return {
        "a": torch.cat(levels_of_tiles, 3),
        "r": torch.cat(ranges_of_tiles, 3),
    }


def rollouts(records: list[Record]) -> Tensor:
    """Return (B, layers, starts, tokens): rollout from each layer down to the picture.

    The starts of a layer are the class token, if any, and the mean row. All rows go through a
    layer's map together, so that it is formed once; the page does the same row by row.
    """
    top = records[-1]
    # (B, starts, tokens): all starts so far, none to begin with
    rows = torch.empty(top.batch, 0, top.queries.tokens, device=device_of(top))
    for record in reversed(records):
        # those of this layer, in front of those that came down to it
        rows = torch.cat([_start_rows(record), rows], 1)
        rows = (rows + _attended(record, rows)) / 2
    rows = rows.detach().cpu()
    # (B, layers * starts, tokens) -> (B, layers, starts, tokens)
    return rows.unflatten(1, (len(records), -1))


def _attended(record: Record, rows: Tensor) -> Tensor:
    """Return rows A for (B, n, queries), A the mean over heads: (B, n, keys)."""
    total = torch.zeros((), device=rows.device)
    for start in range(0, rows.shape[2], _TILE_ROWS):
        tile = slice(start, start + _TILE_ROWS)
        weights = record.rows(tile).float().mean(1)  # (B, H, tile, Nk) -> (B, tile, Nk)
        total = total + rows[..., tile] @ weights
    return total


def _start_rows(record: Record) -> Tensor:
    """Return (B, starts, tokens): the class token where there is one, and the mean over patches."""
    queries = record.queries
    patches = queries.tokens - queries.prefix
    mean = torch.zeros(queries.tokens, device=device_of(record))
    mean[queries.prefix :] = 1 / patches
    rows = mean[None]
    if queries.prefix:
        class_token = torch.zeros_like(mean)
        class_token[0] = 1
        rows = torch.stack([class_token, mean])
    return rows.expand(record.batch, -1, -1)
