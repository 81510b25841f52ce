"""What commands are given: a model by path or name, photographs by file or folder."""

import sys
from collections.abc import Iterable, Iterator, Sequence
from difflib import get_close_matches
from pathlib import Path

import torch
from PIL import Image
from rich.console import Console
from rich.progress import track

from visattn.data.images import list_images
from visattn.data.transform import EvalTransform
from visattn.models.table import create_model
from visattn.training.classifier import Classifier, load


def open_classifier(
    model: str,
    *,
    image_size: int | None = None,
    pretrained: bool = False,
    weights: str | None = None,
    random: bool = False,
) -> Classifier:
    """Return a run's or checkpoint's classifier, or a model of timm's with the weights that were asked for."""
    ways = {"--pretrained": pretrained, "--weights FILE": weights, "--random": random}
    asked = [way for way, given in ways.items() if given]
    if not model.startswith("timm:"):
        if asked:
            raise ValueError(f"{asked[0]} is for timm:NAME; {model} brings its own weights")
        return _resized(_loaded(model), image_size)
    if len(asked) != 1:
        got = " and ".join(asked) or "none of them"
        raise ValueError(f"{model} needs one of {', '.join(ways)}; got {got}")
    if weights and not Path(weights).is_file():
        raise FileNotFoundError(f"--weights: there is no file {weights!r}")
    return _of_timm(model, image_size, pretrained, weights)


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
    raise ValueError(f"--target must be a class name or 0 to {len(classes) - 1}, got {target!r}{hint}")


def batches(entries: Sequence, size: int) -> Iterator[Sequence]:
    """Yield the entries in groups of at most ``size``."""
    if size < 1:
        raise ValueError(f"--batch-size must be 1 or more, got {size}")
    for start in range(0, len(entries), size):
        yield entries[start : start + size]


def tracked(steps: Iterable, what: str, total: int) -> Iterator:
    """Yield the steps under a progress bar, where someone is watching."""
    console = Console(stderr=True)
    yield from track(steps, what, total, console=console, transient=True, disable=not console.is_terminal)


def complained(prog: str, failed: Sequence[str]) -> int:
    """Name what was left out and return the exit code: 1 if that is anything."""
    for message in failed:
        print(f"{prog}: left out: {message}", file=sys.stderr)
    return 1 if failed else 0


def _loaded(model: str) -> Classifier:
    if Path(model).exists():
        return load(model)
    beside = [str(path) for path in Path(model).parent.glob("*")]
    near = get_close_matches(model, beside, n=1)
    hint = f"; did you mean {near[0]}?" if near else "; it must be a run's folder, a checkpoint or timm:NAME"
    raise FileNotFoundError(f"--model: there is no {model!r}{hint}")


def _resized(classifier: Classifier, image_size: int | None) -> Classifier:
    if image_size is not None:
        old = classifier.transform
        mean, std = old.mean / 255, old.std / 255
        classifier.transform = EvalTransform((image_size, image_size), resize=old.resize, mean=mean, std=std)
    return classifier


def _of_timm(model: str, image_size: int | None, pretrained: bool, weights: str | None) -> Classifier:
    from timm.data import ImageNetInfo, resolve_model_data_config

    torch.manual_seed(0)
    # timm converts and resizes what its own loader reads, so a file takes the place of its download
    options = {"pretrained_cfg_overlay": {"file": weights}} if weights else {}
    try:
        network = create_model(model, image_size=image_size, pretrained=bool(pretrained or weights), **options)
    except Exception as error:  # torch raises a dozen types for files that are damaged or made for another model
        if weights is None:
            raise
        raise ValueError(f"--weights: {weights} does not fit {model} ({str(error).splitlines()[0]})") from error
    facts = resolve_model_data_config(network)
    size = (image_size, image_size) if image_size else tuple(facts["input_size"][1:])
    count = getattr(network, "num_classes", 0) or 0
    names = (
        ImageNetInfo().label_descriptions()
        if (pretrained or weights) and count == 1000
        else [f"class {i}" for i in range(count)]
    )
    return Classifier(network, EvalTransform(size, mean=facts["mean"], std=facts["std"]), names)
