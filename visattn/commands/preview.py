"""`visattn preview CONFIG`: what a training would see and how fast it would learn, before it starts."""

import logging
import os
import shlex
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from jsonargparse import Namespace
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from visattn.data.augment import TrainTransform
from visattn.data.module import ImageData
from visattn.data.sampler import occurrence
from visattn.training.module import ImageClassifier
from visattn.training.optimizer import planned_steps
from visattn.training.parser import parse
from visattn.training.run import build_data, build_module

POINTS = 400  # of the learning rate's curve


@dataclass
class TrainingPlan:
    """Data and model of a training, and the limits of its trainer; nothing is run."""

    datamodule: ImageData
    model: ImageClassifier
    trainer: SimpleNamespace


def read_plan(arguments: list[str]) -> TrainingPlan:
    """Build data and model of ``train.py fit ARGUMENTS``, without weights and workers."""
    _, config = parse(["fit", *arguments])
    config.model.pretrained = False  # no weights are needed, so none are downloaded
    config.model.weights = None  # or read
    config.data.num_workers = 0  # a few images need no workers
    data = build_data(config)
    module = build_module(config, data)
    return TrainingPlan(data, module, _trainer_limits(config, data))


def _trainer_limits(config: Namespace, data: ImageData) -> SimpleNamespace:
    """Return what the schedule asks a trainer for, with Lightning's defaults."""
    limits = SimpleNamespace(
        datamodule=data,
        max_epochs=config.trainer.max_epochs,
        max_steps=-1,
        limit_train_batches=1.0,
        accumulate_grad_batches=config.trainer.accumulate_grad_batches or 1,
    )
    if config.trainer.max_steps is not None:
        limits.max_steps = config.trainer.max_steps
    if config.trainer.limit_train_batches is not None:
        limits.limit_train_batches = config.trainer.limit_train_batches
    return limits


def run(
    config: str, /, *, change: str = "", images: int = 6, versions: int = 7, out: str = "preview"
) -> None:
    """Draw augmented training images and the learning rate of a configuration, without training.

    Args:
        config: A configuration of train.py, such as configs/own_folder.yaml.
        change: Further keys of train.py, such as "data.root=my_photos/ data.augment=strong".
        images: How many training images, one row each.
        versions: How many augmented versions of each, beside what validation would see of it.
        out: Folder for augmented.png and learning_rate.png.
    """
    if not Path(config).is_file():
        raise FileNotFoundError(f"there is no config {config!r}")
    if images < 1 or versions < 1:
        raise ValueError(f"--images and --versions must be 1 or more, got {images} and {versions}")
    changed = [f"--{key.removeprefix('--')}" for key in shlex.split(change)]
    logging.getLogger("lightning.fabric").setLevel(logging.WARNING)
    parts = read_plan(["--config", config, *changed])
    target = Path(out)
    target.mkdir(parents=True, exist_ok=True)
    draw_sheet(parts.datamodule, images, versions).savefig(target / "augmented.png", dpi=100)
    rates = learning_rates(parts)
    draw_rates(rates, parts.trainer).savefig(target / "learning_rate.png", dpi=100)
    _say(parts, rates)
    print(f"pictures in          {target / 'augmented.png'} and {target / 'learning_rate.png'}")


def draw_sheet(data: ImageData, images: int, versions: int) -> Figure:
    """A row for each of some training images: as validation would see it, then as the first epochs will."""
    loader = data.train_dataloader()
    transform, chosen = loader.dataset.transform, _spread(data, images)
    height, width = data.image_size
    figure = Figure(
        figsize=(1.3 * (versions + 1), 1.3 * len(chosen) * height / width + 0.4),
        layout="constrained",
    )
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(chosen), versions + 1, squeeze=False)
    for row, (position, image, name) in zip(axes, chosen, strict=True):
        row[0].set_ylabel(name, fontsize=8)
        for axis, pixels in zip(row, _versions(transform, image, position, versions), strict=True):
            axis.imshow(pixels)
            axis.set(xticks=[], yticks=[])
    axes[0, 0].set_title("validation", fontsize=8)
    for epoch in range(versions):
        axes[0, epoch + 1].set_title(f"epoch {epoch + 1}", fontsize=8)
    return figure


def _versions(
    transform: TrainTransform, image: Image.Image, position: int, count: int
) -> list[np.ndarray]:
    seen = [transform.pixels(image, (epoch, position, 0)) for epoch in range(count)]
    return [transform.evaluation.pixels(image), *seen]


def _spread(data: ImageData, count: int) -> list[tuple[int, Image.Image, str]]:
    """(position, image, class names) of readable training images, from one class after another."""
    images = data.train_dataloader().dataset
    labels = np.asarray(images.source.labels)[images.indices]
    first = labels.argmax(1) if labels.ndim > 1 else labels
    found = []
    for position in np.lexsort((first, occurrence(first))).tolist():
        try:
            image = images.source.image(int(images.indices[position]), images.transform.long_side)
        except ValueError:  # unreadable: left out of the training too
            continue
        label = labels[position]
        names = (
            [data.classes[n] for n in np.flatnonzero(label)]
            if label.ndim
            else [data.classes[label]]
        )
        found.append((position, image, "\n".join(names)[:40]))
        if len(found) == count:
            break
    return found


def learning_rates(parts: TrainingPlan) -> dict[str, list[tuple[int, float]]]:
    """(step, rate) of the fastest and of the slowest group of weights, from the schedule that training would use."""
    parts.model._trainer = parts.trainer
    planned = parts.model.configure_optimizers()
    optimizer, schedule = planned["optimizer"], planned["lr_scheduler"]["scheduler"]
    _, steps = planned_steps(parts.trainer)
    shown = sorted({round(step) for step in np.linspace(0, steps - 1, min(steps, POINTS))})
    tops = [group["initial_lr"] for group in optimizer.param_groups]
    curves = {"learning rate": max(tops)} | (
        {"of the slowest layers": min(tops)} if min(tops) < max(tops) else {}
    )
    share = schedule.lr_lambdas[0]
    return {name: [(step, top * share(step)) for step in shown] for name, top in curves.items()}


def draw_rates(rates: dict[str, list[tuple[int, float]]], trainer: SimpleNamespace) -> Figure:
    """The learning rate over the steps."""
    figure = Figure(figsize=(6, 3), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    for name, points in rates.items():
        axis.plot(*zip(*points, strict=True), label=name)
    per_epoch, _ = planned_steps(trainer)
    axis.set(xlabel=f"step ({per_epoch} to an epoch)", ylabel="learning rate", ylim=(0, None))
    axis.spines[["top", "right"]].set_visible(False)
    if len(rates) > 1:
        axis.legend(frameon=False)
    return figure


def _say(parts: TrainingPlan, rates: dict[str, list[tuple[int, float]]]) -> None:
    data, (per_epoch, steps) = parts.datamodule, planned_steps(parts.trainer)
    counts = data.class_counts
    named = ", ".join(
        f"{name} {count}" for name, count in list(zip(data.classes, counts, strict=True))[:12]
    )
    more = f" and {len(counts) - 12} more" if len(counts) > 12 else ""
    top = max(rate for points in rates.values() for _, rate in points)
    print(f"training images      {sum(counts):,} labels of {len(counts)} classes: {named}{more}")
    print(
        f"steps                {per_epoch:,} an epoch of {data.batch_size} images, {steps:,} in all"
    )
    print(f"learning rate        up to {top:.3g}")
    if data.skipped:
        print(
            f"left out             {len(data.skipped)} files, such as {os.fspath(data.skipped[0])}"
        )
