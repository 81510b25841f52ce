"""mistakes.html: the most confident mistakes of a classifier, and where it looked. One file, no network."""

from heapq import nlargest
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn

from visattn.draw.html import Markup, fill, picture_source, write_html
from visattn.draw.overlay import overlay
from visattn.training.recipe import Recipe
from visattn.training.reports.attention_overlays import look, photographs

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
<p>@counted@ Left the image as the network gets it, right where it looked (@method@).</p>
<main>
@figures@
</main></html>
"""
FIGURE = """<figure><img alt="image" src="@picture@"><img alt="attention" src="@heat@">
<figcaption>@truth@, taken for <b>@answer@</b> with @probability@<br><small>@name@</small></figcaption></figure>"""


class Mistakes:
    """Keep the most confident mistakes of a pass over labeled images.

    Args:
        count: How many are kept.
    """

    def __init__(self, count: int = 24):
        self.count = count
        self.kept: list[tuple[float, int, Tensor, int, int]] = []
        self.wrong, self.total, self.processes = 0, 0, 1
        self.names: list[str] = []

    def add(self, images: Tensor, labels: Tensor, probabilities: Tensor) -> None:
        """Look through a batch."""
        values, answers = probabilities.max(1)
        missed = (answers != labels).nonzero().flatten().tolist()
        rows = [
            (float(values[i]), -self.total - i, images[i].cpu(), int(labels[i]), int(answers[i]))
            for i in missed
        ]
        self.kept = nlargest(self.count, [*self.kept, *rows], key=lambda row: row[:2])
        self.wrong, self.total = self.wrong + len(missed), self.total + len(labels)


@torch.no_grad()
def collect(
    model: nn.Module, loader, device: torch.device, count: int = 24, recipe: Recipe | None = None
) -> Mistakes:
    """Return the mistakes of a model over a loader of images and labels, asked as validation by its recipe asks it."""
    found, recipe = Mistakes(count), recipe or Recipe()
    for images, labels in loader:
        found.add(
            images, labels, recipe.probabilities(recipe.scores(model, images.to(device))).cpu()
        )
    found.processes = getattr(loader.sampler, "num_replicas", 1)
    seen = loader.dataset
    if (
        len(seen) == found.total
    ):  # none was unreadable, and no other process has a share: the order is that of the files
        found.names = [seen.source.name(int(index)) for index in seen.indices]
    return found


def write_mistakes(
    found: Mistakes, model: nn.Module, data, path: Path, device: torch.device
) -> None:
    """Draw the mistakes with what the model looked at; an image without a mistake leaves a page that says so."""
    figures, method = [], "nothing to show"
    if found.kept:
        values, places, images, labels, answers = zip(*found.kept, strict=True)
        seen = look(model, torch.stack(images).to(device))
        method = seen.heat.method
        pictures = photographs(torch.stack(images), data.transform_config())
        for number, picture in enumerate(pictures):
            shown = overlay(picture, seen.heat[number])
            figure = {
                "picture": _source(picture),
                "heat": _source(shown),
                "truth": data.classes[labels[number]],
                "answer": data.classes[answers[number]],
                "probability": f"{values[number]:.3f}",
                "name": found.names[-places[number]] if found.names else "",
            }
            figures.append(fill(FIGURE, figure))
    fields = {
        "title": path.parent.name,
        "counted": _counted(found),
        "method": method,
        "figures": Markup("\n".join(figures)),
    }
    write_html(path, fill(PAGE, fields))


def _counted(found: Mistakes) -> str:
    if found.processes == 1:
        return f"{found.wrong} of {found.total} images were mistaken."
    share = f"Of the {found.total} images of the first of {found.processes} processes {found.wrong} were mistaken"
    return f"{share}; those of the others are not on this page."


def _source(picture) -> str:
    return picture_source(Image.fromarray(picture))
