"""What commands are given: a model by path or name, photographs by file or folder."""

import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

import torch
from cyclopts import Parameter
from PIL import Image
from rich.console import Console
from rich.progress import track
from torch import nn

from visattn.data.images import list_images
from visattn.data.transform import EvalTransform
from visattn.models.presets import create_model
from visattn.training.classifier import Classifier, load_classifier


@Parameter(name="*")
@dataclass(frozen=True)
class ModelSource:
    """Which model a command looks at.

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


def open_classifier(source: ModelSource) -> Classifier:
    """Return a run's or checkpoint's classifier, or a model of timm's with the weights that were asked for."""
    ways = {
        "--pretrained": source.pretrained,
        "--weights FILE": source.weights,
        "--random": source.random,
    }
    asked = [way for way, given in ways.items() if given]
    if not source.model.startswith("timm:"):
        if asked:
            raise ValueError(f"{asked[0]} is for timm:NAME; {source.model} brings its own weights")
        return _resized(_loaded(source.model), source.image_size)
    if len(asked) != 1:
        got = " and ".join(asked) or "none of them"
        raise ValueError(f"{source.model} needs one of {', '.join(ways)}; got {got}")
    if source.weights and not Path(source.weights).is_file():
        raise FileNotFoundError(f"--weights: there is no file {source.weights!r}")
    return _of_timm(source)


def photographs(paths: Sequence[str]) -> list[tuple[str, object, int]]:
    """Return (name, source, index) of every photograph in the files, folders and zips given."""
    found = []
    for path in paths:
        images = list_images(path, "photos")
        root = Path(path).parent if images.names[0] == Path(path).name else Path(path)
        found += [(str(root / images.name(i)), images, i) for i in range(len(images))]
    return found


def picture(photo: Image.Image, transform: EvalTransform) -> Image.Image:
    """Return the part of a photograph that the model sees, at about 512 pixels instead of the model's own size."""
    height, width = transform.image_size
    factor = max(1.0, 512 / max(height, width))
    finer = EvalTransform((round(height * factor), round(width * factor)), resize=transform.resize)
    return Image.fromarray(finer.pixels(photo))


def class_number(target: str | None, classes: Sequence[str]) -> int | None:
    """Return the class meant by a name or number."""
    if target is None or target in classes:
        return None if target is None else classes.index(target)
    if not classes:
        raise ValueError("--target needs a model that predicts classes; this one has no head")
    if target.isdigit() and int(target) < len(classes):
        return int(target)
    near = get_close_matches(target, classes, n=1, cutoff=0.4)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ValueError(
        f"--target must be a class name or 0 to {len(classes) - 1}, got {target!r}{hint}"
    )


def batches(entries: Sequence, size: int) -> Iterator[Sequence]:
    """Yield the entries in groups of at most ``size``."""
    if size < 1:
        raise ValueError(f"--batch-size must be 1 or more, got {size}")
    for start in range(0, len(entries), size):
        yield entries[start : start + size]


def tracked(steps: Iterable, what: str, total: int) -> Iterator:
    """Yield the steps under a progress bar, where someone is watching."""
    console = Console(stderr=True)
    yield from track(
        steps, what, total, console=console, transient=True, disable=not console.is_terminal
    )


def complained(prog: str, failed: Sequence[str]) -> int:
    """Name what was left out and return the exit code: 1 if that is anything."""
    for message in failed:
        print(f"{prog}: left out: {message}", file=sys.stderr)
    return 1 if failed else 0


def _loaded(model: str) -> Classifier:
    if Path(model).exists():
        return load_classifier(model)
    beside = [str(path) for path in Path(model).parent.glob("*")]
    near = get_close_matches(model, beside, n=1)
    hint = (
        f"; did you mean {near[0]}?"
        if near
        else "; it must be a run's folder, a checkpoint or timm:NAME"
    )
    raise FileNotFoundError(f"--model: there is no {model!r}{hint}")


def _resized(classifier: Classifier, image_size: int | None) -> Classifier:
    if image_size is not None:
        old = classifier.transform
        mean, std = old.mean / 255, old.std / 255
        classifier.transform = EvalTransform(
            (image_size, image_size), resize=old.resize, mean=mean, std=std
        )
    return classifier


def _of_timm(source: ModelSource) -> Classifier:
    from timm.data import resolve_model_data_config

    network = _network(source)
    facts = resolve_model_data_config(network)
    size = (source.image_size,) * 2 if source.image_size else tuple(facts["input_size"][1:])
    names = _class_names(getattr(network, "num_classes", 0) or 0, trained=not source.random)
    return Classifier(network, EvalTransform(size, mean=facts["mean"], std=facts["std"]), names)


def _network(source: ModelSource) -> nn.Module:
    torch.manual_seed(0)
    # timm converts and resizes what its own loader reads, so a file takes the place of its download
    options = {"pretrained_cfg_overlay": {"file": source.weights}} if source.weights else {}
    try:
        return create_model(
            source.model, image_size=source.image_size, pretrained=not source.random, **options
        )
    except (
        Exception
    ) as error:  # torch raises a dozen types for files that are damaged or made for another model
        if source.weights is None:
            raise
        first = str(error).splitlines()[0]
        raise ValueError(
            f"--weights: {source.weights} does not fit {source.model} ({first})"
        ) from error


def _class_names(count: int, trained: bool) -> Sequence[str]:
    from timm.data import ImageNetInfo

    return (
        ImageNetInfo().label_descriptions()
        if trained and count == 1000
        else [f"class {i}" for i in range(count)]
    )
