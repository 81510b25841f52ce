"""`visattn score`: which maps tell the truth, with confidence intervals and two baselines that look at nothing."""

import json
from collections import Counter
from difflib import get_close_matches
from pathlib import Path
from typing import NamedTuple

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from visattn.bench.timing import table as markdown
from visattn.commands.inputs import (
    ModelSource,
    batches,
    complained,
    open_classifier,
    photographs,
    tracked,
)
from visattn.data.synthetic import PlacedCharacters
from visattn.draw.files import writable
from visattn.map import Map
from visattn.methods.explain import METHODS, explain_or_zeros
from visattn.metrics.pixels import deletion, insertion
from visattn.metrics.truth import energy_pointing, pointing_game, segmentation
from visattn.training.classifier import Classifier

BASELINES = ("random", "center")
BETTER = {
    "insertion": "high",
    "deletion": "low",
    "pointing": "high",
    "energy": "high",
    "overlap": "high",
}
_RESAMPLES = 1000


def run(
    *,
    source: ModelSource,
    data: str,
    methods: str = "rollout,gae,gradcam",
    out: str = "scores",
    limit: int = 100,
    steps: int = 50,
    batch_size: int = 16,
    seed: int = 0,
):
    """Measure which maps tell the truth: a table with 95 % confidence intervals, a plot, and every single value.

    Insertion and deletion need images only. Where the data know the truth (synthetic), pointing
    (hottest pixel on the object, within 15 pixels of 224), energy (share of the map on the object)
    and overlap (mean IoU of the map cut at its mean) are added. Random values and a spot in the
    center are scored beside the methods.

    Args:
        data: Folder or zip of images, whose predicted classes are explained; or synthetic,
            explained by true class.
        methods: Names of methods, with commas.
        out: Folder for scores.json and scores.png.
        limit: Images taken at most, evenly from a folder.
        steps: Steps of insertion and deletion.
        batch_size: Images explained at once.
        seed: Seed of the random maps and the resampling.
    """
    names = _checked(methods)
    folder = writable(Path(out))
    classifier = open_classifier(source)
    if not classifier.classes:
        raise ValueError(f"--model: {source.model} predicts no classes, so no score can change")
    samples, failed = _samples(data, classifier, limit)
    values, empty = _measured(classifier, samples, names, steps, batch_size, seed)
    table = {
        name: {key: _interval(each, seed) for key, each in row.items()}
        for name, row in values.items()
    }
    print(_text(table, len(samples)))
    for name, count in empty.items():
        print(f"{name}: the maps of {count} images are zero everywhere, and scored as they are")
    _plot(table, len(samples)).savefig(folder / "scores.png")
    facts = {
        "model": source.model,
        "data": data,
        "images": len(samples),
        "steps": steps,
        "seed": seed,
    }
    _write(folder / "scores.json", facts | {"zero_maps": empty}, table, values)
    print(f"\nplot and values: {folder / 'scores.png'}, {folder / 'scores.json'}")
    return complained("visattn score", failed)


def _write(path: Path, facts: dict, table: dict, values: dict) -> None:
    each = {
        name: {key: value.tolist() for key, value in row.items()} for name, row in values.items()
    }
    mean = {
        name: {key: entry._asdict() for key, entry in row.items()} for name, row in table.items()
    }
    text = json.dumps({**facts, "better": BETTER, "scores": mean, "values": each}, indent=1)
    path.write_text(text + "\n", encoding="utf-8")


class Interval(NamedTuple):
    """Mean over images with the ends of its 95 % bootstrap interval."""

    mean: float
    low: float
    high: float


class _Sample(NamedTuple):
    image: Tensor
    label: int | None
    truth: Tensor | None


def _checked(methods: str) -> list[str]:
    names = [name.strip() for name in methods.split(",") if name.strip()]
    for name in names:
        if name not in METHODS:
            near = get_close_matches(name, METHODS, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ValueError(f"--methods must be among {', '.join(METHODS)}, got {name!r}{hint}")
    if not names:
        raise ValueError("--methods must name at least one method")
    return names


def _samples(data: str, classifier: Classifier, limit: int) -> tuple[list[_Sample], list[str]]:
    """Read up to ``limit`` images, evenly from all; unreadable ones are named and left out."""
    if limit < 1:
        raise ValueError(f"--limit must be 1 or more, got {limit}")
    if data == "synthetic":
        found = PlacedCharacters(
            "test", image_size=classifier.transform.image_size, with_truth=True
        )
        if found.classes != classifier.classes:
            raise ValueError(
                f"--data synthetic needs a model of its classes {', '.join(found.classes)}"
            )
        # its labels take turns, so the first images hold all classes alike, and evenly taken ones
        # might not
        items = [found[i] for i in range(min(len(found), limit))]
        return [
            _Sample(classifier.transform(photo), label, truth) for photo, label, truth in items
        ], []
    photos, samples, failed = photographs([data]), [], []
    for i in _evenly(len(photos), limit):
        _, source, index = photos[i]
        try:
            samples.append(_Sample(classifier.transform(source.image(index)), None, None))
        except ValueError as error:
            failed.append(str(error))
    if not samples:
        raise ValueError(f"none of the images can be read: {failed[0]}")
    return samples, failed


def _evenly(count: int, limit: int) -> list[int]:
    return [i * count // min(count, limit) for i in range(min(count, limit))]


def _measured(
    classifier: Classifier, samples: list, names: list[str], steps: int, batch_size: int, seed: int
) -> tuple[dict, Counter]:
    """Return for each method and baseline the values of every measure, one per image; and how many maps are zero."""
    parts: dict = {name: {} for name in (*names, *BASELINES)}
    generator, empty = torch.Generator().manual_seed(seed), Counter()
    groups = list(batches(samples, batch_size))
    for group in tracked(groups, "scoring", len(groups)):
        images = torch.stack([sample.image for sample in group])
        with torch.no_grad():
            predicted = classifier.model(images).argmax(1)
        target = (
            predicted
            if group[0].label is None
            else torch.tensor([sample.label for sample in group])
        )
        truth = None if group[0].truth is None else torch.stack([sample.truth for sample in group])
        heats = {name: explain_or_zeros(classifier.model, images, target, name) for name in names}
        empty += Counter(
            {name: int((heat.values == 0).flatten(1).all(1).sum()) for name, heat in heats.items()}
        )
        shape = heats[names[0]].values.shape
        heats |= {"random": torch.rand(shape, generator=generator), "center": _center(shape)}
        for name, heat in heats.items():
            for key, value in _measures(
                classifier.model, images, heat, target, truth, steps
            ).items():
                parts[name].setdefault(key, []).append(value.float().cpu())
    return {
        name: {key: torch.cat(values) for key, values in row.items()} for name, row in parts.items()
    }, empty


def _measures(
    model, images: Tensor, heat: Map | Tensor, target: Tensor, truth: Tensor | None, steps: int
) -> dict[str, Tensor]:
    found = {
        "insertion": insertion(model, images, heat, target, steps),
        "deletion": deletion(model, images, heat, target, steps),
    }
    if truth is None:
        return found
    tolerance = round(15 * min(truth.shape[1:]) / 224)
    place = {
        "pointing": pointing_game(heat, truth, tolerance),
        "energy": energy_pointing(heat, truth),
    }
    return {**found, **place, "overlap": segmentation(heat, truth).iou}


def _center(shape: tuple[int, ...]) -> Tensor:
    """Return a spot in the middle, a Gaussian of a quarter of each side: what most photographs reward."""
    y, x = (torch.linspace(-1, 1, size) if size > 1 else torch.zeros(1) for size in shape[1:])
    return torch.exp(-2 * (y[:, None] ** 2 + x**2)).expand(shape).contiguous()


def _interval(values: Tensor, seed: int) -> Interval:
    """Return the mean and the 2.5 and 97.5 percentiles of the means of resampled images."""
    picks = torch.randint(
        len(values), (_RESAMPLES, len(values)), generator=torch.Generator().manual_seed(seed)
    )
    low, high = values[picks].mean(1).quantile(torch.tensor([0.025, 0.975])).tolist()
    return Interval(values.mean().item(), low, high)


def _text(table: dict[str, dict[str, Interval]], count: int) -> str:
    """Return the table in Markdown; the best of a column is bold."""
    keys = list(next(iter(table.values())))
    best = {
        key: (min if BETTER[key] == "low" else max)(row[key].mean for row in table.values())
        for key in keys
    }
    rows = []
    for name, row in table.items():
        means = {
            key: f"**{e.mean:.3f}**" if e.mean == best[key] else f"{e.mean:.3f}"
            for key, e in row.items()
        }
        rows.append(
            [name, *(f"{means[key]} [{e.low:.3f}, {e.high:.3f}]" for key, e in row.items())]
        )
    text = markdown(["method", *(f"{key} ({BETTER[key]} is good)" for key in keys)], rows)
    return f"{text}\n\n{count} images; means with 95 % bootstrap intervals; bold is the best mean."


def _plot(table: dict[str, dict[str, Interval]], count: int) -> Figure:
    keys, names = list(next(iter(table.values()))), list(table)[::-1]
    figure = Figure(
        figsize=(2.6 * len(keys) + 1.4, 0.34 * len(names) + 1.3), dpi=130, layout="constrained"
    )
    FigureCanvasAgg(figure)
    for axis, key in zip(
        figure.subplots(1, len(keys), sharey=True, squeeze=False)[0], keys, strict=True
    ):
        for row, name in enumerate(names):
            entry = table[name][key]
            color = "0.55" if name in BASELINES else "#5b21b6"
            axis.plot([entry.low, entry.high], [row, row], color=color, lw=2)
            axis.plot(entry.mean, row, "o", color=color, ms=6)
        axis.set_title(f"{key}\n{BETTER[key]} is good", fontsize=9)
        axis.set_yticks(range(len(names)), names, fontsize=9)
        axis.tick_params(axis="x", labelsize=8)
        axis.grid(axis="x", lw=0.4)
    figure.supxlabel(f"mean of {count} images with 95 % bootstrap interval", fontsize=8)
    return figure
