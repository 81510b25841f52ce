"""`visattn map`: draw what a model looks at over photographs."""

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from cyclopts import Parameter
from PIL import Image
from torch import Tensor, nn

from visattn.commands.inputs import (
    ModelSource,
    batches,
    class_number,
    complained,
    open_classifier,
    photographs,
    picture,
    tracked,
)
from visattn.data.images import FileImages
from visattn.draw.files import save_maps, writable
from visattn.draw.grids import heads_by_layers
from visattn.draw.page import page as write_page
from visattn.draw.payload import layer_of
from visattn.map import Map
from visattn.methods.explain import explain
from visattn.record import Record, capture
from visattn.training.classifier import Classifier

_MOST_ON_A_PAGE, _MOST_LINES = 12, 20


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
):
    """Draw what a model looks at: pictures with scale bar and predicted class, raw maps (NPZ) and index.json.

    Args:
        photos: Photographs, folders or zips of them.
        out: Folder to write.
        page: Write page.html too, an interactive page that works offline.
        grid: heads = draw all heads of all layers of each photograph too.
        batch_size: Photographs run through the model at once.
    """
    folder = writable(Path(out))
    classifier = open_classifier(source)
    asked = _asked(question, classifier, page, grid)
    answers, heat, failed = _ask(classifier, photographs(photos), asked, batch_size)
    labels = [answer.label for answer in answers]
    drawn = (answer.picture(classifier) for answer in answers)
    names, facts = (
        [Path(answer.name).stem for answer in answers],
        [answer.facts() for answer in answers],
    )
    pictures = tracked(drawn, "drawing", len(answers))
    items = save_maps(
        heat, pictures, folder, names=names, labels=labels, facts=facts, **asdict(look)
    )
    if grid:
        _draw_heads(classifier, answers, items, folder, look.colormap)
    if page:
        _write_page(
            classifier, answers[:_MOST_ON_A_PAGE], heat, folder / "page.html", look.colormap
        )
    return _report(answers, items, failed, folder, page)


def _asked(question: Question, classifier: Classifier, page: bool, grid: str | None) -> "_Asked":
    """Settle what is asked, and refuse before anything is drawn what the model has nothing for."""
    method, layer = question.method, question.layer
    if method is None or page or grid:
        records = _seen(classifier)
        tokens = [record for record in records if record.kind == "token"]
        if grid and not any(record.grid for record in tokens):
            raise ValueError(
                "--grid heads needs attention between tokens, and this model has none: leave it out"
            )
        if page and not any(layer_of(record) for record in records):
            raise ValueError(
                "--page needs attention that lies on the picture, and this model has none: leave it out"
            )
        method = method or (
            "rollout" if tokens and all(record.grid for record in tokens) else "gradcam"
        )
    layer = int(layer) if layer and layer.lstrip("-").isdigit() else layer
    return _Asked(method, layer, question.head, class_number(question.target, classifier.classes))


def _seen(classifier: Classifier) -> list[Record]:
    """Return the attention that runs in a model of which nothing is known."""
    with torch.no_grad(), capture(classifier.model) as maps:
        classifier.model(torch.zeros(1, 3, *classifier.transform.image_size))
    return maps.records


class _Asked(NamedTuple):
    method: str
    layer: int | str | None
    head: int | None
    target: int | None

    def of(self, model: nn.Module, batch: Tensor) -> Map:
        if self.method == "raw":
            with torch.no_grad(), capture(model, keep="qk") as maps:
                model(batch)
            return maps.map(layer=-1 if self.layer is None else self.layer, head=self.head)
        if self.head is not None:
            raise ValueError(f"--head is for --method raw; {self.method} joins all heads")
        layers = None if self.layer is None else [self.layer]
        return explain(model, batch, target=self.target, method=self.method, layers=layers)


class _Answer(NamedTuple):
    name: str
    source: FileImages
    index: int
    winner: str | None
    probability: float | None

    @property
    def label(self) -> str:
        return "" if self.winner is None else f"{self.winner} {self.probability:.1%}"

    def facts(self) -> dict:
        return {"file": self.name, "class": self.winner, "probability": self.probability}

    def photo(self) -> Image.Image:
        return self.source.image(self.index)

    def picture(self, classifier: Classifier) -> Image.Image:
        return picture(self.photo(), classifier.transform)


def _ask(
    classifier: Classifier, photos: list, asked: _Asked, batch_size: int
) -> tuple[list, Map, list[str]]:
    """Run all photographs through the model, the unreadable ones named and left out."""
    answers, heats, failed = [], [], []
    for group in tracked(
        list(batches(photos, batch_size)), "looking", -(-len(photos) // batch_size)
    ):
        read = [
            (photo, tensor)
            for photo in group
            if (tensor := _tensor(photo, classifier, failed)) is not None
        ]
        if not read:
            continue
        batch = torch.stack([tensor for _, tensor in read])
        heats.append(asked.of(classifier.model, batch))
        winners = _winners(classifier, batch)
        answers += [
            _Answer(*photo, *winner) for (photo, _), winner in zip(read, winners, strict=True)
        ]
    if not answers:
        raise ValueError(f"none of the {len(photos)} photographs can be read: {failed[0]}")
    return answers, _joined(heats), failed


def _winners(classifier: Classifier, batch: Tensor) -> list[tuple[str | None, float | None]]:
    """Return predicted class and probability of each image; a model without a head predicts nothing."""
    if not classifier.classes:
        return [(None, None)] * len(batch)
    with torch.no_grad():
        best, index = classifier.probabilities(classifier.model(batch)).max(1)
    return [
        (classifier.classes[i], round(p, 6))
        for i, p in zip(index.tolist(), best.tolist(), strict=True)
    ]


def _tensor(photo: tuple, classifier: Classifier, failed: list[str]) -> Tensor | None:
    _, source, index = photo
    try:
        return classifier.transform(source.image(index))
    except ValueError as error:
        failed.append(str(error))
        return None


def _joined(heats: list[Map]) -> Map:
    """Put the maps of several batches into one."""
    one = heats[0]
    joined = {
        name: _together([getattr(heat, name) for heat in heats])
        for name in ("values", "target", "prefix_mass")
    }
    notes = {name: _together([heat.notes[name] for heat in heats]) for name in one.notes}
    return replace(one, **joined, notes=notes)


def _together(parts: list):
    return torch.cat(parts) if isinstance(parts[0], Tensor) and parts[0].ndim else parts[0]


def _draw_heads(
    classifier: Classifier, answers: list, items: list[dict], folder: Path, colormap: str
) -> None:
    for answer, item in tracked(zip(answers, items, strict=True), "heads", len(answers)):
        photo = answer.photo()
        with torch.no_grad(), capture(classifier.model) as maps:
            classifier.model(classifier.transform(photo)[None])
        drawn = heads_by_layers(maps, picture(photo, classifier.transform), colormap=colormap)
        drawn.save(folder / f"{item['name']}-heads.png")


def _write_page(
    classifier: Classifier, answers: list, heat: Map, path: Path, colormap: str
) -> None:
    photos = [answer.photo() for answer in answers]
    with torch.no_grad(), capture(classifier.model) as maps:
        classifier.model(torch.stack([classifier.transform(photo) for photo in photos]))
    few = replace(heat, values=heat.values[: len(answers)])
    few = (
        few
        if heat.prefix_mass is None
        else replace(few, prefix_mass=heat.prefix_mass[: len(answers)])
    )
    pictures = [picture(photo, classifier.transform) for photo in photos]
    names, labels = (
        [Path(answer.name).name for answer in answers],
        [answer.label for answer in answers],
    )
    write_page(
        maps,
        pictures,
        path,
        heats={heat.method: few},
        names=names,
        labels=labels,
        colormap=colormap,
    )


def _report(answers: list, items: list[dict], failed: list[str], folder: Path, page: bool) -> int:
    for answer, item in zip(answers[:_MOST_LINES], items, strict=False):
        print(f"{answer.name}: {answer.label or 'no classes'} -> {folder / item['picture']}")
    if len(answers) > _MOST_LINES:
        print(f"... and {len(answers) - _MOST_LINES} more, listed in {folder / 'index.json'}")
    if page:
        some = (
            f", the first {_MOST_ON_A_PAGE} photographs" if len(answers) > _MOST_ON_A_PAGE else ""
        )
        print(f"interactive page{some}: {folder / 'page.html'}")
    return complained("visattn map", failed)
