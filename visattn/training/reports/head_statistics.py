"""How widely each head of each layer attends: entropy and mean distance, watched while a network learns."""

import csv
import math
from pathlib import Path

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from visattn.record.entry import Record
from visattn.record.session import Maps

TILE = 2**22  # weights looked at together
FIELDS = ("step", "layer", "head", "entropy", "distance")


def head_statistics(maps: Maps) -> list[dict]:
    r"""Return for each layer of tokens and head: its name, number, entropy and mean attention distance.

    The entropy is :math:`-\sum_k \alpha_k \ln \alpha_k / \ln N` of rows made to sum to one: 1 where all N keys are
    attended alike. The distance (Dosovitskiy et al. 2021, figure 7) is that between the patches of
    query and key, weighed by :math:`\alpha`, in sides of the image; None where patches are folded into windows.
    """
    found = []
    for record in maps.tokens:
        entropy, distance = _measured(record)
        for head in range(record.heads):
            far = None if distance is None else float(distance[head])
            found.append(
                {
                    "layer": record.name,
                    "head": head,
                    "entropy": float(entropy[head]),
                    "distance": far,
                }
            )
    return found


def _measured(record: Record) -> tuple[Tensor, Tensor | None]:
    """Sum over tiles of queries, so that long sequences need no N x N matrix."""
    places = _places(record)
    first = record.rows(slice(0, 1))
    groups, heads, _, keys = first.shape
    count = record.q.shape[2] if record.q is not None else record.alpha.shape[2]
    step = max(1, TILE // (groups * heads * keys))
    entropy, distance = torch.zeros(heads), torch.zeros(heads)
    for start in range(0, count, step):
        alpha = record.rows(slice(start, start + step)).float()
        alpha = alpha / alpha.sum(-1, keepdim=True).clamp(min=1e-12)
        entropy += torch.special.entr(alpha).sum(-1).mean(0).sum(-1).cpu()
        if places is not None:
            distance += _distance(alpha, start, places, record)
    entropy = entropy / count / max(math.log(keys), 1e-12)
    return entropy, None if places is None else distance / len(places)


def _places(record: Record) -> Tensor | None:
    """Return the (y, x) of every patch, in sides of the image, where queries and keys are the patches of one grid."""
    queries, keys = record.queries, record.keys
    if record.pool or queries.index is not None or keys.index is not None or keys.grid is None:
        return None
    if queries.grid != keys.grid or queries.prefix != keys.prefix:
        return None
    height, width = keys.grid
    return torch.cartesian_prod(torch.arange(height), torch.arange(width)) / max(height, width)


def _distance(alpha: Tensor, start: int, places: Tensor, record: Record) -> Tensor:
    prefix = record.keys.prefix
    skip = max(0, prefix - start)  # queries of this tile that are no patches
    inner = alpha[:, :, skip:, prefix : prefix + len(places)]
    inner = inner / inner.sum(-1, keepdim=True).clamp(min=1e-12)
    first = start + skip - prefix
    far = torch.cdist(places[first : first + inner.shape[2]], places).to(inner.device)
    return (inner[:, :, : len(far)] * far).sum(-1).mean(0).sum(-1).cpu()


def add_rows(path: Path, step: int, found: list[dict]) -> None:
    """Add what was found to a table; rows of this and later steps, of a run that was stopped, are replaced."""
    rows = [row for row in read_rows(path) if int(row["step"]) < step]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, FIELDS)
        writer.writeheader()
        writer.writerows([*rows, *({"step": step, **row} for row in found)])


def read_rows(path: Path) -> list[dict]:
    """Return the rows of such a table, or none."""
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def draw_heads(rows: list[dict], path: Path) -> None:
    """Draw entropy and distance over the steps: a thin line per head, a thick one for the mean of each layer."""
    figure = Figure(figsize=(9, 3.5), layout="constrained")
    FigureCanvasAgg(figure)
    layers = list(dict.fromkeys(row["layer"] for row in rows))
    steps = sorted({int(row["step"]) for row in rows})
    for axis, quantity in zip(figure.subplots(1, 2), ("entropy", "distance"), strict=True):
        for number, layer in enumerate(layers):
            color = f"C{number % 10}"
            mine = [row for row in rows if row["layer"] == layer and row[quantity]]
            heads = {
                head: [row for row in mine if row["head"] == head]
                for head in {row["head"] for row in mine}
            }
            for points in heads.values():
                values = [float(row[quantity]) for row in points]
                axis.plot(
                    [int(row["step"]) for row in points],
                    values,
                    color=color,
                    alpha=0.3,
                    linewidth=0.7,
                )
            means = [
                [float(row[quantity]) for row in mine if int(row["step"]) == step] for step in steps
            ]
            drawn = [
                (step, sum(part) / len(part))
                for step, part in zip(steps, means, strict=True)
                if part
            ]
            if drawn:
                axis.plot(*zip(*drawn, strict=True), color=color, marker=".", label=layer)
        axis.set(
            xlabel="step",
            ylabel={"entropy": "entropy / ln N", "distance": "distance / side"}[quantity],
        )
        axis.set_ylim(0, 1.05 if quantity == "entropy" else None)
        axis.spines[["top", "right"]].set_visible(False)
    figure.legend(
        *figure.axes[0].get_legend_handles_labels(),
        loc="outside right upper",
        frameon=False,
        fontsize=7,
    )
    figure.savefig(path, dpi=120)
