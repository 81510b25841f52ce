"""How widely each head attends while a network learns: entropy and mean attention distance."""

import csv
import math
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from visattn.record.entry import Record
from visattn.record.session import Maps

TILE = 2**22  # weights in memory at once
FIELDS = ("step", "layer", "head", "entropy", "distance")
AXIS_LABELS = {"entropy": "entropy / ln N", "distance": "distance / side"}


def head_statistics(maps: Maps) -> list[dict[str, Any]]:
    r"""Return a row per token layer and head: layer, head, entropy and mean attention distance.

    The entropy is :math:`-\sum_k \alpha_k \ln \alpha_k / \ln N` of rows made to sum to one: 1 where
    all N keys are attended alike. The distance (Dosovitskiy et al. 2021, figure 7) is that between
    the patches of query and key, weighed by :math:`\alpha`, in sides of the image; None where
    patches are folded into windows.
    """
    rows = []
    for record in maps.tokens:
        entropy, distance = _measure_heads(record)
        for head in range(record.heads):
            row: dict[str, Any] = {
                "layer": record.name,
                "head": head,
                "entropy": float(entropy[head]),
                "distance": None,
            }
            if distance is not None:
                row["distance"] = float(distance[head])
            rows.append(row)
    return rows


def _measure_heads(record: Record) -> tuple[Tensor, Tensor | None]:
    """Return entropy and distance per head, summed over tiles of queries: no N x N matrix."""
    coordinates = _patch_coordinates(record)
    batch, heads, _, keys = record.rows(slice(0, 1)).shape
    queries = _query_count(record)
    tile_rows = max(1, TILE // (batch * heads * keys))
    entropy = torch.zeros(heads)
    distance = torch.zeros(heads)
    for start in range(0, queries, tile_rows):
        alpha = record.rows(slice(start, start + tile_rows)).float()  # (B, H, rows, keys)
        alpha = alpha / alpha.sum(-1, keepdim=True).clamp(min=1e-12)
        entropy += _sum_rows(torch.special.entr(alpha))
        if coordinates is not None:
            distance += _tile_distance(alpha, start, coordinates, record.keys.prefix)
    entropy = entropy / queries / max(math.log(keys), 1e-12)
    if coordinates is None:
        return entropy, None
    return entropy, distance / len(coordinates)


def _query_count(record: Record) -> int:
    if record.q is not None:
        return record.q.shape[2]
    assert record.alpha is not None  # a record holds either queries or weights
    return record.alpha.shape[2]


def _sum_rows(values: Tensor) -> Tensor:
    """(B, H, rows, keys) -> (H,): sum over keys and rows, mean over images."""
    return values.sum(-1).mean(0).sum(-1).cpu()


def _patch_coordinates(record: Record) -> Tensor | None:
    """Return the (y, x) of every patch in sides of the image, (N, 2).

    None unless queries and keys are the patches of one grid.
    """
    queries = record.queries
    keys = record.keys
    is_regrouped = queries.index is not None or keys.index is not None
    if record.pool or is_regrouped or keys.grid is None:
        return None
    if queries.grid != keys.grid or queries.prefix != keys.prefix:
        return None
    height, width = keys.grid
    return torch.cartesian_prod(torch.arange(height), torch.arange(width)) / max(height, width)


def _tile_distance(
    alpha: Tensor,
    start: int,
    coordinates: Tensor,
    prefix: int,
) -> Tensor:
    """Return the summed distance per head of a tile of queries that begins at ``start``."""
    prefix_rows = max(0, prefix - start)  # queries of this tile that are no patches
    patch_alpha = alpha[:, :, prefix_rows:, prefix : prefix + len(coordinates)]
    patch_alpha = patch_alpha / patch_alpha.sum(-1, keepdim=True).clamp(min=1e-12)
    first_patch = start + prefix_rows - prefix
    tile_coordinates = coordinates[first_patch : first_patch + patch_alpha.shape[2]]
    distances = torch.cdist(tile_coordinates, coordinates).to(alpha.device)  # (rows, N)
    return _sum_rows(patch_alpha[:, :, : len(distances)] * distances)


def add_rows(
    path: Path,
    step: int,
    statistics: list[dict[str, Any]],
) -> None:
    """Add a step's rows to a table; rows of this and later steps (a stopped run's) go."""
    rows: list[dict[str, Any]] = []
    for row in read_rows(path):
        if int(row["step"]) < step:
            rows.append(row)
    for row in statistics:
        rows.append({"step": step, **row})
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, FIELDS)
        writer.writeheader()
        writer.writerows(rows)


def read_rows(path: Path) -> list[dict[str, str]]:
    """Return the rows of such a table; none where there is no file."""
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def draw_heads(rows: list[dict[str, str]], path: Path) -> None:
    """Draw entropy and distance over the steps: a thin line per head, a thick one per layer."""
    figure = Figure(figsize=(9, 3.5), layout="constrained")
    FigureCanvasAgg(figure)
    layers = list(dict.fromkeys(row["layer"] for row in rows))
    axes = figure.subplots(1, 2)
    for axis, quantity in zip(axes, ("entropy", "distance"), strict=True):
        for number, layer in enumerate(layers):
            layer_rows = [row for row in rows if row["layer"] == layer and row[quantity]]
            _draw_layer(axis, layer_rows, quantity, layer, color=f"C{number % 10}")
        axis.set(xlabel="step", ylabel=AXIS_LABELS[quantity])
        axis.set_ylim(bottom=0)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylim(0, 1.05)  # an entropy is at most 1
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", frameon=False, fontsize=7)
    figure.savefig(path, dpi=120)


def _draw_layer(
    axis: Axes,
    rows: list[dict[str, str]],
    quantity: str,
    layer: str,
    color: str,
) -> None:
    """Draw a thin line for each head of a layer, and a thick one for their mean."""
    by_head: dict[str, dict[int, float]] = {}
    by_step: dict[int, list[float]] = {}
    for row in rows:
        step = int(row["step"])
        value = float(row[quantity])
        by_head.setdefault(row["head"], {})[step] = value
        by_step.setdefault(step, []).append(value)
    for curve in by_head.values():
        steps = list(curve)
        axis.plot(steps, list(curve.values()), color=color, alpha=0.3, linewidth=0.7)
    steps = sorted(by_step)
    means = [sum(by_step[step]) / len(by_step[step]) for step in steps]
    if steps:
        axis.plot(steps, means, color=color, marker=".", label=layer)
