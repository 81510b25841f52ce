"""`visattn map`: draw what a model looks at over photographs."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from cyclopts import Parameter
from PIL import Image
from torch import Tensor, nn

from visattn.commands.inputs import (
    ModelSource,
    Photograph,
    batches,
    class_number,
    crop_as_seen,
    list_photographs,
    open_classifier,
    report_left_out,
    show_progress,
)
from visattn.draw.files import save_maps, writable
from visattn.draw.grids import heads_by_layers
from visattn.draw.page import page as write_page
from visattn.draw.payload import layer_of
from visattn.map import Map
from visattn.methods.explain import explain
from visattn.record import Record, capture
from visattn.training.classifier import Classifier

MOST_ON_A_PAGE = 12  # photographs
MOST_LINES = 20  # printed, one per photograph


@Parameter(name="*")
@dataclass(frozen=True)
class Question:
    """What is asked of the model.

    Args:
        method: Name of the method; raw takes --layer and --head. Without it rollout, or gradcam for
            a model in which no tokens attend tokens.
        layer: Number or name of the layer, as index.json names it; -1 is the last.
        head: One head of the layer, for method raw; without it the mean over heads.
        target: Class to explain, by name or number; without it the predicted class of each
            photograph.
    """

    method: str | None = None
    layer: str | None = None
    head: int | None = None
    target: str | None = None


@Parameter(name="*")
@dataclass(frozen=True)
class DrawOptions:
    """How maps are drawn.

    Args:
        colormap: Name of a matplotlib colormap.
        blend: How map and photograph are combined.
        alpha: Opacity of the map.
        vmin: Value of the first color; without it the smallest of all maps.
        vmax: Value of the last color; without it the largest of all maps.
        own_scale: Give each picture its own scale; without it all share one, so that they compare.
    """

    colormap: str = "inferno"
    blend: Literal["alpha", "contour", "mask"] = "alpha"
    alpha: float = 0.5
    vmin: float | None = None
    vmax: float | None = None
    own_scale: bool = False


class Request(NamedTuple):
    """A question after it was checked against the model."""

    method: str
    layer: int | str | None
    head: int | None
    target: int | None

    def explain(self, model: nn.Module, images: Tensor) -> Map:
        if self.method == "raw":
            layer = -1 if self.layer is None else self.layer
            with torch.no_grad(), capture(model, keep="qk") as maps:
                model(images)
            return maps.map(layer=layer, head=self.head)
        if self.head is not None:
            raise ValueError(f"--head is for --method raw; {self.method} joins all heads")
        layers = None if self.layer is None else [self.layer]
        return explain(model, images, target=self.target, method=self.method, layers=layers)


class Prediction(NamedTuple):
    """What the model predicts for one photograph; no class where it has no head."""

    photograph: Photograph
    class_name: str | None
    probability: float | None

    @property
    def label(self) -> str:
        if self.class_name is None:
            return ""
        return f"{self.class_name} {self.probability:.1%}"

    def as_json(self) -> dict:
        return {
            "file": self.photograph.name,
            "class": self.class_name,
            "probability": self.probability,
        }


def run(
    photos: list[str],
    /,
    *,
    source: ModelSource,
    question: Question = Question(),
    look: DrawOptions = DrawOptions(),
    out: str = "maps",
    page: bool = False,
    grid: Literal["heads"] | None = None,
    batch_size: int = 8,
) -> int:
    """Draw what a model looks at: pictures with scale bar and predicted class, NPZ and index.json.

    Args:
        photos: Photographs, folders or zips of them.
        out: Folder to write.
        page: Write page.html too, an interactive page that works offline.
        grid: heads = draw all heads of all layers of each photograph too.
        batch_size: Photographs run through the model at once.
    """
    folder = writable(Path(out))
    classifier = open_classifier(source)
    request = check_question(question, classifier, page, grid)
    photographs = list_photographs(photos)
    predictions, heat, unreadable = explain_photographs(
        classifier, photographs, request, batch_size
    )
    pictures = (read_as_seen(each.photograph, classifier) for each in predictions)
    items = save_maps(
        show_progress(pictures, "drawing", len(predictions)),
        heat,
        folder,
        names=[Path(each.photograph.name).stem for each in predictions],
        labels=[each.label for each in predictions],
        facts=[each.as_json() for each in predictions],
        **asdict(look),
    )
    if grid:
        draw_heads(classifier, predictions, items, folder, look.colormap)
    if page:
        path = folder / "page.html"
        draw_page(classifier, predictions[:MOST_ON_A_PAGE], heat, path, look.colormap)
    print_report(predictions, items, folder, page)
    return report_left_out("visattn map", unreadable)


def check_question(
    question: Question, classifier: Classifier, page: bool, grid: str | None
) -> Request:
    """Choose method and layer, and refuse before anything is drawn what the model cannot show."""
    method = question.method
    if method is None or page or grid:
        records = record_blank_image(classifier)
        default_method = check_attention(records, page, grid)
        method = method or default_method
    layer: int | str | None = question.layer
    if question.layer and question.layer.lstrip("-").isdigit():
        layer = int(question.layer)
    target = class_number(question.target, classifier.classes)
    return Request(method, layer, question.head, target)


def record_blank_image(classifier: Classifier) -> list[Record]:
    """Return the attention calls of one forward pass of the model."""
    blank = torch.zeros(1, 3, *classifier.transform.image_size)
    with torch.no_grad(), capture(classifier.model) as maps:
        classifier.model(blank)
    return maps.records


def check_attention(records: list[Record], page: bool, grid: str | None) -> str:
    """Refuse a page or grid that the attention cannot fill; return the method that suits it."""
    tokens = [record for record in records if record.kind == "token"]
    if grid and not any(record.grid for record in tokens):
        raise ValueError(
            "--grid heads needs attention between tokens, and this model has none: leave it out"
        )
    if page and not any(layer_of(record) for record in records):
        raise ValueError(
            "--page needs attention that lies on the picture, and this model has none: leave it out"
        )
    if tokens and all(record.grid for record in tokens):
        return "rollout"
    return "gradcam"


def explain_photographs(
    classifier: Classifier,
    photographs: Sequence[Photograph],
    request: Request,
    batch_size: int,
) -> tuple[list[Prediction], Map, list[str]]:
    """Predict and explain all photographs; the messages name those that cannot be read."""
    predictions: list[Prediction] = []
    heats: list[Map] = []
    unreadable: list[str] = []
    groups = list(batches(photographs, batch_size))
    for group in show_progress(groups, "explaining", len(groups)):
        readable, tensors = read_batch(group, classifier, unreadable)
        if not readable:
            continue
        images = torch.stack(tensors)
        heats.append(request.explain(classifier.model, images))
        predictions += predict(classifier, readable, images)
    if not predictions:
        raise ValueError(f"none of the {len(photographs)} photographs can be read: {unreadable[0]}")
    return predictions, join_maps(heats), unreadable


def read_batch(
    photographs: Sequence[Photograph], classifier: Classifier, unreadable: list[str]
) -> tuple[list[Photograph], list[Tensor]]:
    readable = []
    tensors = []
    for photograph in photographs:
        try:
            tensor = classifier.transform(photograph.read())
        except ValueError as error:
            unreadable.append(str(error))
            continue
        readable.append(photograph)
        tensors.append(tensor)
    return readable, tensors


def predict(
    classifier: Classifier, photographs: Sequence[Photograph], images: Tensor
) -> list[Prediction]:
    if not classifier.classes:
        return [Prediction(photograph, None, None) for photograph in photographs]
    with torch.no_grad():
        probabilities, numbers = classifier.probabilities(classifier.model(images)).max(1)
    predictions = []
    rows = zip(photographs, numbers.tolist(), probabilities.tolist(), strict=True)
    for photograph, number, probability in rows:
        name = classifier.classes[number]
        predictions.append(Prediction(photograph, name, round(probability, 6)))
    return predictions


def join_maps(heats: Sequence[Map]) -> Map:
    """Put the maps of several batches into one."""
    first = heats[0]
    fields = {}
    for name in ("values", "target", "prefix_mass"):
        fields[name] = concatenate([getattr(heat, name) for heat in heats])
    notes = {}
    for name in first.notes:
        notes[name] = concatenate([heat.notes[name] for heat in heats])
    return replace(first, **fields, notes=notes)


def concatenate(values: list):
    """Concatenate tensors with one row per image; anything else is the same for all batches."""
    if isinstance(values[0], Tensor) and values[0].ndim > 0:
        return torch.cat(values)
    return values[0]


def read_as_seen(photograph: Photograph, classifier: Classifier) -> Image.Image:
    return crop_as_seen(photograph.read(), classifier.transform)


def draw_heads(
    classifier: Classifier,
    predictions: Sequence[Prediction],
    items: Sequence[dict],
    folder: Path,
    colormap: str,
) -> None:
    pairs = zip(predictions, items, strict=True)
    for prediction, item in show_progress(pairs, "heads", len(predictions)):
        photo = prediction.photograph.read()
        with torch.no_grad(), capture(classifier.model) as maps:
            classifier.model(classifier.transform(photo)[None])
        picture = crop_as_seen(photo, classifier.transform)
        heads = heads_by_layers(picture, maps, colormap=colormap)
        heads.save(folder / f"{item['name']}-heads.png")


def draw_page(
    classifier: Classifier,
    predictions: Sequence[Prediction],
    heat: Map,
    path: Path,
    colormap: str,
) -> None:
    photos = [each.photograph.read() for each in predictions]
    images = torch.stack([classifier.transform(photo) for photo in photos])
    with torch.no_grad(), capture(classifier.model) as maps:
        classifier.model(images)
    count = len(predictions)
    prefix_mass = None if heat.prefix_mass is None else heat.prefix_mass[:count]
    shown = replace(heat, values=heat.values[:count], prefix_mass=prefix_mass)
    write_page(
        [crop_as_seen(photo, classifier.transform) for photo in photos],
        maps,
        path,
        heats={heat.method: shown},
        names=[Path(each.photograph.name).name for each in predictions],
        labels=[each.label for each in predictions],
        colormap=colormap,
    )


def print_report(
    predictions: Sequence[Prediction], items: Sequence[dict], folder: Path, page: bool
) -> None:
    for prediction, item in list(zip(predictions, items, strict=True))[:MOST_LINES]:
        label = prediction.label or "no classes"
        print(f"{prediction.photograph.name}: {label} -> {folder / item['picture']}")
    if len(predictions) > MOST_LINES:
        remaining = len(predictions) - MOST_LINES
        print(f"... and {remaining} more, listed in {folder / 'index.json'}")
    if page:
        limit = ""
        if len(predictions) > MOST_ON_A_PAGE:
            limit = f", the first {MOST_ON_A_PAGE} photographs"
        print(f"interactive page{limit}: {folder / 'page.html'}")
