"""mistakes.html: the most confident mistakes of a classifier, and where it looked, in one file."""

from dataclasses import dataclass
from heapq import nlargest
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader

from visattn.data.module import ImageData
from visattn.draw.html import Markup, fill, picture_source, write_html
from visattn.draw.overlay import overlay
from visattn.training.recipe import Recipe
from visattn.training.reports.attention_overlays import explain_batch, photographs

PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>Mistakes of @title@</title>
<style>
body { font: 14px/1.4 system-ui, sans-serif; margin: 2em; color: #222; background: #fff }
main { display: flex; flex-wrap: wrap; gap: 1em }
figure { margin: 0; padding: .6em; border: 1px solid #ddd; border-radius: 6px }
img { width: 160px; display: inline-block; vertical-align: top }
b { color: #b00020 }
figcaption { max-width: 330px; overflow-wrap: anywhere }
small { color: #666 }
</style>
<h1>The most confident mistakes of @title@</h1>
<p>@counts@ Left the image as the network gets it, right where it looked (@method@).</p>
<main>
@figures@
</main></html>
"""
FIGURE = """<figure><img alt="image" src="@picture@"><img alt="attention" src="@heat@">
<figcaption>@truth@, taken for <b>@answer@</b> with @probability@<br><small>@name@</small>\
</figcaption></figure>"""


@dataclass(frozen=True)
class Mistake:
    """One image that got the wrong class.

    Args:
        probability: Of the wrong class.
        position: Number of the image in the pass.
        image: (3, h, w), normalized.
        label: Number of the right class.
        answer: Number of the wrong class.
    """

    probability: float
    position: int
    image: Tensor
    label: int
    answer: int

    def confidence(self) -> tuple[float, int]:
        """Order mistakes by probability; the earlier of two equal ones is first."""
        return self.probability, -self.position


class Mistakes:
    """Collect the most confident mistakes of a pass over labeled images.

    Args:
        count: Number of mistakes that are kept.
    """

    def __init__(self, count: int = 24):
        self.count = count
        self.worst: list[Mistake] = []
        self.wrong = 0
        self.total = 0
        self.processes = 1
        self.file_names: list[str] = []

    def add(
        self,
        images: Tensor,
        labels: Tensor,
        probabilities: Tensor,
    ) -> None:
        """Add the mistakes of a batch: images (B, 3, h, w), labels (B,), probabilities (B, C)."""
        values, answers = probabilities.max(1)
        wrong_rows = (answers != labels).nonzero().flatten().tolist()
        mistakes = []
        for row in wrong_rows:
            mistake = Mistake(
                probability=float(values[row]),
                position=self.total + row,
                image=images[row].cpu(),
                label=int(labels[row]),
                answer=int(answers[row]),
            )
            mistakes.append(mistake)
        self.worst = nlargest(self.count, self.worst + mistakes, key=Mistake.confidence)
        self.wrong += len(wrong_rows)
        self.total += len(labels)


@torch.no_grad()
def collect(
    model: nn.Module,
    loader: DataLoader,
    device: torch.device,
    count: int = 24,
    recipe: Recipe | None = None,
) -> Mistakes:
    """Return the mistakes of a model over a loader, with the recipe's views and probabilities."""
    recipe = recipe or Recipe()
    mistakes = Mistakes(count)
    for images, labels in loader:
        scores = recipe.scores(model, images.to(device))
        mistakes.add(images, labels, recipe.probabilities(scores).cpu())
    mistakes.processes = getattr(loader.sampler, "num_replicas", 1)
    dataset: Any = loader.dataset  # an ImageSet, which DataLoader's type does not say
    # no file was unreadable and no other process has a share: positions are those of the files
    if len(dataset) == mistakes.total:
        mistakes.file_names = [dataset.source.name(int(index)) for index in dataset.indices]
    return mistakes


def write_mistakes(
    mistakes: Mistakes,
    model: nn.Module,
    data: ImageData,
    path: Path,
    device: torch.device,
) -> None:
    """Write the page of mistakes with maps of where the model looked; without any it says so."""
    figures = []
    method = "nothing to show"
    if mistakes.worst:
        images = torch.stack([mistake.image for mistake in mistakes.worst])  # (M, 3, h, w)
        heat = explain_batch(model, images.to(device)).heat
        method = heat.method
        pictures = photographs(images, data.transform_config())
        for number, mistake in enumerate(mistakes.worst):
            picture = pictures[number]
            figure = {
                "picture": _picture_source(picture),
                "heat": _picture_source(overlay(picture, heat[number])),
                "truth": data.classes[mistake.label],
                "answer": data.classes[mistake.answer],
                "probability": f"{mistake.probability:.3f}",
                "name": "",
            }
            if mistakes.file_names:
                figure["name"] = mistakes.file_names[mistake.position]
            figures.append(fill(FIGURE, figure))
    fields = {
        "title": path.parent.name,
        "counts": _describe_counts(mistakes),
        "method": method,
        "figures": Markup("\n".join(figures)),
    }
    write_html(path, fill(PAGE, fields))


def _describe_counts(mistakes: Mistakes) -> str:
    wrong = mistakes.wrong
    total = mistakes.total
    if mistakes.processes == 1:
        return f"{wrong} of {total} images were mistaken."
    return (
        f"Of the {total} images of the first of {mistakes.processes} processes {wrong} were "
        "mistaken; those of the others are not on this page."
    )


def _picture_source(pixels: np.ndarray) -> str:
    return picture_source(Image.fromarray(pixels))
