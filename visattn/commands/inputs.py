"""What commands work on: a model by path or name, photographs by file or folder; and progress."""

import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from cyclopts import Parameter
from PIL import Image
from rich.console import Console
from rich.progress import track
from torch import nn

from visattn.data.images import FileImages, list_images
from visattn.data.transform import EvalTransform
from visattn.models.presets import create_model
from visattn.names import suggest
from visattn.training.classifier import Classifier, load_classifier

T = TypeVar("T")

PICTURE_SIDE = 512  # pixels of the longer side of a drawn photograph, at least
IMAGENET_CLASSES = 1000


@Parameter(name="*")
@dataclass(frozen=True)
class ModelSource:
    """Which model a command opens.

    Args:
        model: Folder of a run, a checkpoint, or timm:NAME.
        image_size: Side of the square the model is given.
        pretrained: Download timm's weights.
        weights: File with weights for timm:NAME.
        random: Take random weights for timm:NAME.
    """

    model: str
    image_size: int | None = None
    pretrained: bool = False
    weights: str | None = None
    random: bool = False

    @property
    def is_timm(self) -> bool:
        return self.model.startswith("timm:")


@dataclass(frozen=True)
class Photograph:
    """One image of a folder, zip or single file, not read yet."""

    name: str
    images: FileImages
    index: int

    def read(self) -> Image.Image:
        return self.images.image(self.index)


def open_classifier(source: ModelSource) -> Classifier:
    """Return a run's or checkpoint's classifier, or a model of timm with the chosen weights."""
    check_weights(source)
    if source.is_timm:
        return open_timm(source)
    return with_image_size(open_path(source.model), source.image_size)


def check_weights(source: ModelSource) -> None:
    """Refuse weights for a model that has its own, and a model of timm without a choice."""
    choices = {
        "--pretrained": source.pretrained,
        "--weights FILE": source.weights is not None,
        "--random": source.random,
    }
    chosen = [option for option, is_chosen in choices.items() if is_chosen]
    if not source.is_timm:
        if chosen:
            raise ValueError(f"{chosen[0]} is for timm:NAME; {source.model} brings its own weights")
        return
    if len(chosen) != 1:
        got = " and ".join(chosen) or "none of them"
        raise ValueError(f"{source.model} needs one of {', '.join(choices)}; got {got}")
    if source.weights is not None and not Path(source.weights).is_file():
        raise FileNotFoundError(f"--weights: there is no file {source.weights!r}")


def open_path(model: str) -> Classifier:
    path = Path(model)
    if path.exists():
        return load_classifier(model)
    neighbors = [str(neighbor) for neighbor in path.parent.glob("*")]
    raise FileNotFoundError(
        f"--model must be a run's folder, a checkpoint or timm:NAME; there is no {model!r}: "
        f"{suggest(model, neighbors)}"
    )


def with_image_size(classifier: Classifier, image_size: int | None) -> Classifier:
    if image_size is None:
        return classifier
    trained = classifier.transform
    classifier.transform = EvalTransform(
        (image_size, image_size),
        resize=trained.resize,
        mean=(trained.mean / 255).tolist(),
        std=(trained.std / 255).tolist(),
    )
    return classifier


def open_timm(source: ModelSource) -> Classifier:
    from timm.data import resolve_model_data_config

    network = create_timm_network(source)
    config = resolve_model_data_config(network)
    size = tuple(config["input_size"][1:])
    if source.image_size is not None:
        size = (source.image_size, source.image_size)
    transform = EvalTransform(size, mean=config["mean"], std=config["std"])
    num_classes = getattr(network, "num_classes", 0) or 0
    return Classifier(network, transform, class_names(num_classes, trained=not source.random))


def create_timm_network(source: ModelSource) -> nn.Module:
    torch.manual_seed(0)
    options: dict[str, Any] = {}
    if source.weights is not None:
        # timm's own loader converts and resizes weights, so a file takes the place of its download.
        options["pretrained_cfg_overlay"] = {"file": source.weights}
    try:
        return create_model(
            source.model,
            image_size=source.image_size,
            pretrained=not source.random,
            **options,
        )
    except Exception as error:
        # torch raises a dozen types for files that are damaged or belong to another model.
        if source.weights is None:
            raise
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"--weights: {source.weights} does not fit {source.model} ({reason})"
        ) from error


def class_names(count: int, trained: bool) -> list[str]:
    """Return ImageNet's names for a trained model of 1000 classes, numbers for any other."""
    from timm.data import ImageNetInfo

    if trained and count == IMAGENET_CLASSES:
        return list(ImageNetInfo().label_descriptions())
    return [f"class {number}" for number in range(count)]


def list_photographs(paths: Sequence[str]) -> list[Photograph]:
    """List every photograph in the files, folders and zips."""
    photographs = []
    for path in paths:
        images = list_images(path, "photos")
        is_single_file = images.names[0] == Path(path).name
        root = Path(path).parent if is_single_file else Path(path)
        for index in range(len(images)):
            photographs.append(Photograph(str(root / images.name(index)), images, index))
    return photographs


def crop_as_seen(photo: Image.Image, transform: EvalTransform) -> Image.Image:
    """Return the part of a photograph that the model sees, at about 512 pixels or more."""
    height, width = transform.image_size
    factor = max(1.0, PICTURE_SIDE / max(height, width))
    size = (round(height * factor), round(width * factor))
    finer = EvalTransform(size, resize=transform.resize)
    return Image.fromarray(finer.pixels(photo))


def class_number(target: str | None, classes: Sequence[str]) -> int | None:
    """Return the number of the class that a name or number means."""
    if target is None:
        return None
    if target in classes:
        return classes.index(target)
    if not classes:
        raise ValueError("--target needs a model that predicts classes; this one has no head")
    if target.isdigit() and int(target) < len(classes):
        return int(target)
    raise ValueError(
        f"--target must be a class name or 0 to {len(classes) - 1}, got {target!r}; "
        f"{suggest(target, classes)}"
    )


def batches(entries: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    """Yield the entries in groups of at most ``size``."""
    if size < 1:
        raise ValueError(f"--batch-size must be 1 or more, got {size}")
    for start in range(0, len(entries), size):
        yield entries[start : start + size]


def show_progress(steps: Iterable[T], description: str, total: int) -> Iterator[T]:
    """Yield the steps under a progress bar, if standard error is a terminal."""
    console = Console(stderr=True)
    yield from track(
        steps,
        description,
        total,
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )


def report_left_out(command: str, messages: Sequence[str]) -> int:
    """Print what was left out and return the exit code: 1 if that is anything."""
    for message in messages:
        print(f"{command}: left out: {message}", file=sys.stderr)
    return 1 if messages else 0
