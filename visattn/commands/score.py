"""`visattn score`: which maps tell the truth, beside two baselines that ignore the image."""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor, nn

from visattn.bench.timing import table as markdown
from visattn.commands.inputs import (
    ModelSource,
    batches,
    list_photographs,
    open_classifier,
    report_left_out,
    show_progress,
)
from visattn.data.synthetic import PlacedCharacters
from visattn.draw.files import writable
from visattn.map import Map
from visattn.methods.explain import METHODS, explain_or_zeros
from visattn.metrics.pixels import deletion, insertion
from visattn.metrics.truth import energy_pointing, pointing_game, segmentation
from visattn.names import suggest
from visattn.training.classifier import Classifier

BASELINES = ("random", "center")
BETTER = {
    "insertion": "high",
    "deletion": "low",
    "pointing": "high",
    "energy": "high",
    "overlap": "high",
}
RESAMPLES = 1000  # of the bootstrap
QUANTILES = (0.025, 0.975)  # the ends of a 95 % interval
POINTING_TOLERANCE = 15 / 224  # of the shorter side: 15 pixels at 224


class Interval(NamedTuple):
    """Mean over images with the ends of its 95 % bootstrap interval."""

    mean: float
    low: float
    high: float


class Sample(NamedTuple):
    """An image as the model takes it, with its class and the mask of its object, where known."""

    image: Tensor
    label: int | None
    truth: Tensor | None


Values = dict[str, dict[str, Tensor]]  # method -> measure -> one value per image
Table = dict[str, dict[str, Interval]]  # method -> measure -> interval


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
) -> int:
    """Measure which maps tell the truth: a table with 95 % intervals, a plot, every value.

    Insertion and deletion need images only. Where the data have the true place (synthetic), pointing
    (hottest pixel on the object, within 15 pixels of 224), energy (share of the map on the object)
    and overlap (mean IoU of the map cut at its mean) are added. Random values and a spot in the
    center are scored beside the methods.

    Args:
        data: Folder or zip of images, whose predicted classes are explained; or synthetic,
            explained by true class.
        methods: Names of methods, with commas.
        out: Folder for scores.json and scores.png.
        limit: Images scored at most, evenly from a folder.
        steps: Steps of insertion and deletion.
        batch_size: Images explained at once.
        seed: Seed of the random maps and the resampling.
    """
    names = check_methods(methods)
    folder = writable(Path(out))
    classifier = open_classifier(source)
    if not classifier.classes:
        raise ValueError(f"--model: {source.model} predicts no classes, so no score can change")
    samples, unreadable = read_samples(data, classifier, limit)
    values, zero_maps = score(classifier, samples, names, steps, batch_size, seed)
    table = summarize(values, seed)
    print(format_table(table, len(samples)))
    for name, count in zero_maps.items():
        print(f"{name}: the maps of {count} images are zero everywhere, and scored as they are")
    draw_intervals(table, len(samples)).savefig(folder / "scores.png")
    facts = {
        "model": source.model,
        "data": data,
        "images": len(samples),
        "steps": steps,
        "seed": seed,
        "zero_maps": zero_maps,
    }
    write_json(folder / "scores.json", facts, table, values)
    print(f"\nplot and values: {folder / 'scores.png'}, {folder / 'scores.json'}")
    return report_left_out("visattn score", unreadable)


def check_methods(methods: str) -> list[str]:
    """Split the names at commas and refuse unknown ones."""
    names = [name.strip() for name in methods.split(",") if name.strip()]
    if not names:
        raise ValueError("--methods must name at least one method")
    for name in names:
        if name not in METHODS:
            raise ValueError(f"--methods: unknown method {name!r}; {suggest(name, METHODS)}")
    return names


def read_samples(data: str, classifier: Classifier, limit: int) -> tuple[list[Sample], list[str]]:
    """Read up to ``limit`` images; the messages name those that cannot be read."""
    if limit < 1:
        raise ValueError(f"--limit must be 1 or more, got {limit}")
    if data == "synthetic":
        return read_synthetic(classifier, limit), []
    photographs = list_photographs([data])
    samples = []
    unreadable = []
    for index in spread_evenly(len(photographs), limit):
        try:
            image = classifier.transform(photographs[index].read())
        except ValueError as error:
            unreadable.append(str(error))
            continue
        samples.append(Sample(image, None, None))
    if not samples:
        raise ValueError(f"none of the images can be read: {unreadable[0]}")
    return samples, unreadable


def read_synthetic(classifier: Classifier, limit: int) -> list[Sample]:
    size = classifier.transform.image_size
    dataset = PlacedCharacters("test", image_size=size, with_truth=True)
    if dataset.classes != classifier.classes:
        raise ValueError(
            f"--data synthetic needs a model of its classes {', '.join(dataset.classes)}"
        )
    # Its labels take turns: the first images hold all classes alike, evenly spread ones might not.
    samples = []
    for index in range(min(len(dataset), limit)):
        photo, label, *truth = dataset[index]
        samples.append(Sample(classifier.transform(photo), label, truth[0]))
    return samples


def spread_evenly(count: int, limit: int) -> list[int]:
    """Return at most ``limit`` of the numbers below ``count``, evenly spread."""
    picks = min(count, limit)
    return [pick * count // picks for pick in range(picks)]


def score(
    classifier: Classifier,
    samples: Sequence[Sample],
    methods: Sequence[str],
    steps: int,
    batch_size: int,
    seed: int,
) -> tuple[Values, Counter]:
    """Measure every method and baseline on every image; count the maps that are zero."""
    batch_values: dict[str, dict[str, list[Tensor]]] = {}
    zero_maps: Counter = Counter()
    generator = torch.Generator().manual_seed(seed)
    groups = list(batches(samples, batch_size))
    for group in show_progress(groups, "scoring", len(groups)):
        images = torch.stack([sample.image for sample in group])
        target = targets_of(classifier, group, images)
        truth = truth_of(group)
        explained: dict[str, Map] = {}
        for method in methods:
            explanation = explain_or_zeros(classifier.model, images, target, method)
            is_zero = (explanation.values == 0).flatten(1).all(1)
            zero_maps += Counter({method: int(is_zero.sum())})
            explained[method] = explanation
        shape = explained[methods[0]].values.shape
        baselines = {
            "random": torch.rand(shape, generator=generator),
            "center": center_spot(shape),
        }
        heats: dict[str, Map | Tensor] = {**explained, **baselines}
        for method, heat in heats.items():
            measures = measure(classifier.model, images, heat, target, truth, steps)
            collected = batch_values.setdefault(method, {})
            for name, value in measures.items():
                collected.setdefault(name, []).append(value.float().cpu())
    return {method: join(collected) for method, collected in batch_values.items()}, zero_maps


def join(collected: dict[str, list[Tensor]]) -> dict[str, Tensor]:
    return {name: torch.cat(values) for name, values in collected.items()}


def targets_of(classifier: Classifier, samples: Sequence[Sample], images: Tensor) -> Tensor:
    """Return the true class of each image, or the predicted one where the truth is unknown."""
    labels = [sample.label for sample in samples if sample.label is not None]
    if labels:
        return torch.tensor(labels)
    with torch.no_grad():
        return classifier.model(images).argmax(1)


def truth_of(samples: Sequence[Sample]) -> Tensor | None:
    masks = [sample.truth for sample in samples if sample.truth is not None]
    return torch.stack(masks) if masks else None


def measure(
    model: nn.Module,
    images: Tensor,
    heat: Map | Tensor,
    target: Tensor,
    truth: Tensor | None,
    steps: int,
) -> dict[str, Tensor]:
    """Return every measure that the data allow, one value per image."""
    measures = {
        "insertion": insertion(model, images, heat, target, steps),
        "deletion": deletion(model, images, heat, target, steps),
    }
    if truth is not None:
        tolerance = round(POINTING_TOLERANCE * min(truth.shape[1:]))
        measures["pointing"] = pointing_game(heat, truth, tolerance)
        measures["energy"] = energy_pointing(heat, truth)
        measures["overlap"] = segmentation(heat, truth).iou
    return measures


def center_spot(shape: Sequence[int]) -> Tensor:
    """Return a Gaussian spot in the middle (B, h, w), a quarter of each side wide."""
    rows = centered_axis(shape[1])
    columns = centered_axis(shape[2])
    spot = torch.exp(-2 * (rows[:, None] ** 2 + columns**2))
    return spot.expand(*shape).contiguous()


def centered_axis(size: int) -> Tensor:
    return torch.linspace(-1, 1, size) if size > 1 else torch.zeros(1)


def summarize(values: Values, seed: int) -> Table:
    table: Table = {}
    for method, measures in values.items():
        table[method] = {name: bootstrap(each, seed) for name, each in measures.items()}
    return table


def bootstrap(values: Tensor, seed: int) -> Interval:
    """Return the mean and the 2.5 and 97.5 percentiles of the means of resampled images."""
    count = len(values)
    generator = torch.Generator().manual_seed(seed)
    picks = torch.randint(count, (RESAMPLES, count), generator=generator)
    means = values[picks].mean(1)
    low, high = means.quantile(torch.tensor(QUANTILES)).tolist()
    return Interval(values.mean().item(), low, high)


def measures_in(table: Table) -> list[str]:
    return list(next(iter(table.values())))


def format_table(table: Table, count: int) -> str:
    """Return the table in Markdown; the best of a column is bold."""
    measures = measures_in(table)
    best = {}
    for name in measures:
        choose = min if BETTER[name] == "low" else max
        best[name] = choose(row[name].mean for row in table.values())
    rows = []
    for method, row in table.items():
        cells = [method]
        for name, interval in row.items():
            mean = f"{interval.mean:.3f}"
            if interval.mean == best[name]:
                mean = f"**{mean}**"
            cells.append(f"{mean} [{interval.low:.3f}, {interval.high:.3f}]")
        rows.append(cells)
    header = ["method", *(f"{name} ({BETTER[name]} is good)" for name in measures)]
    text = markdown(header, rows)
    return f"{text}\n\n{count} images; means with 95 % bootstrap intervals; bold is the best mean."


def write_json(path: Path, facts: dict, table: Table, values: Values) -> None:
    scores = {}
    single_values = {}
    for method in table:
        scores[method] = {name: each._asdict() for name, each in table[method].items()}
        single_values[method] = {name: each.tolist() for name, each in values[method].items()}
    content = {**facts, "better": BETTER, "scores": scores, "values": single_values}
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def draw_intervals(table: Table, count: int) -> Figure:
    measures = measures_in(table)
    methods = list(reversed(table))  # matplotlib's first row is the lowest
    size = (2.6 * len(measures) + 1.4, 0.34 * len(methods) + 1.3)  # inches
    figure = Figure(figsize=size, dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(measures), sharey=True, squeeze=False)[0]
    for axis, name in zip(axes, measures, strict=True):
        for row, method in enumerate(methods):
            draw_interval(axis, row, method, table[method][name])
        axis.set_title(f"{name}\n{BETTER[name]} is good", fontsize=9)
        axis.set_yticks(range(len(methods)), methods, fontsize=9)
        axis.tick_params(axis="x", labelsize=8)
        axis.grid(axis="x", lw=0.4)
    figure.supxlabel(f"mean of {count} images with 95 % bootstrap interval", fontsize=8)
    return figure


def draw_interval(axis: Axes, row: int, method: str, interval: Interval) -> None:
    color = "0.55" if method in BASELINES else "#5b21b6"  # gray baselines, violet methods
    axis.plot([interval.low, interval.high], [row, row], color=color, lw=2)
    axis.plot(interval.mean, row, "o", color=color, ms=6)
