"""Draw maps of a task whose true explanation is known: synthetic.png, heads.png and page.png.

synthetic.png shows the letter and the maps of several methods; heads.png all heads of all layers;
page.png the interactive page in a headless Chromium, which Playwright drives.

Run from the project's folder, after training: uv run assets/draw_synthetic.py runs/synthetic
"""

import shutil
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch
from matplotlib.cm import ScalarMappable
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image
from playwright.sync_api import sync_playwright
from torch import Tensor

import visattn
from visattn.data.synthetic import PlacedCharacters
from visattn.draw.grids import heads_by_layers
from visattn.training.classifier import Classifier

ASSETS = Path(__file__).parent
METHODS = ("raw", "rollout", "gae", "legrad", "gradcam", "hirescam")
SAMPLES = range(4)  # the first validation images, one of each of four letters
WINDOW = {"width": 1120, "height": 700}


class Samples(NamedTuple):
    """Some validation images as pictures and as the model takes them, and their classes."""

    pictures: list[Image.Image]
    images: Tensor
    labels: Tensor


def read_samples(classifier: Classifier, data: PlacedCharacters) -> Samples:
    pictures = []
    labels = []
    for i in SAMPLES:
        picture, label = data[i]
        pictures.append(picture)
        labels.append(label)
    images = torch.stack([classifier.transform(picture) for picture in pictures])
    return Samples(pictures, images, torch.tensor(labels))


def explain_samples(classifier: Classifier, samples: Samples, methods) -> dict[str, visattn.Map]:
    maps = {}
    for method in methods:
        maps[method] = visattn.explain(classifier.model, samples.images, samples.labels, method)
    return maps


def draw_methods(classifier: Classifier, data: PlacedCharacters) -> None:
    samples = read_samples(classifier, data)
    probabilities = classifier(samples.pictures)
    maps = explain_samples(classifier, samples, METHODS)
    rows = len(samples.pictures)
    columns = 1 + len(METHODS)
    inches = (1.72 * columns, 1.75 * rows + 0.3)
    figure = Figure(figsize=inches, dpi=110, layout="constrained")
    grid = figure.subplots(rows, columns)
    for row, picture in enumerate(samples.pictures):
        label = data.classes[samples.labels[row]]
        best = int(probabilities[row].argmax())
        prediction = f"read as {data.classes[best]} {probabilities[row, best]:.0%}"
        grid[row, 0].imshow(picture)
        grid[row, 0].set_ylabel(f"{label}\n{prediction}", fontsize=8)
        for axes, heat in zip(grid[row, 1:], maps.values(), strict=True):
            _draw_map(axes, picture, heat[row])
        _frame(grid[row], data.box(row))
    for axes, name in zip(grid[0], ("image, letter framed", *METHODS), strict=True):
        axes.set_title(name, fontsize=9)
    colors = ScalarMappable(cmap="inferno")
    bar = figure.colorbar(colors, ax=grid, aspect=40, fraction=0.015, pad=0.01, ticks=[0, 1])
    bar.set_ticklabels(["0", "max"], fontsize=8)
    figure.savefig(ASSETS / "synthetic.png")


def _draw_map(axes, picture: Image.Image, heat: visattn.Map) -> None:
    """Draw a map on its own scale, the outlines of the picture over it, and its maximum."""
    largest = heat.values.max().item()
    values = heat.resize((picture.height, picture.width)).values
    axes.imshow(values, cmap="inferno", vmin=0, vmax=largest)
    axes.contour(picture.convert("L"), levels=[128], colors="white", linewidths=0.5)
    axes.text(
        0.97,
        0.04,
        f"max {largest:.2g}",
        color="white",
        fontsize=7,
        ha="right",
        transform=axes.transAxes,
        bbox={"fc": "black", "lw": 0, "alpha": 0.6, "pad": 1.5},
    )


def _frame(panels, box: tuple[int, int, int, int]) -> None:
    top, left, bottom, right = box
    corner = (left - 0.5, top - 0.5)
    width = right - left
    height = bottom - top
    for axes in panels:
        axes.add_patch(Rectangle(corner, width, height, fill=False, ec="#22c55e", lw=2))
        axes.set(xticks=[], yticks=[])


def draw_heads(classifier: Classifier, data: PlacedCharacters) -> None:
    picture, _ = data[0]
    with torch.no_grad(), visattn.capture(classifier.model) as maps:
        classifier.model(classifier.transform(picture)[None])
    large = picture.resize((256, 256), Image.Resampling.NEAREST)
    heads_by_layers(large, maps, tile=128).save(ASSETS / "heads.png")


def draw_page(classifier: Classifier, data: PlacedCharacters) -> None:
    samples = read_samples(classifier, data)
    with torch.no_grad(), visattn.capture(classifier.model) as maps:
        classifier.model(samples.images)
    heats = explain_samples(classifier, samples, ("gae", "gradcam"))
    names = [data.name(i) for i in SAMPLES]
    labels = [data.classes[label] for label in samples.labels]
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        path = Path(folder) / "page.html"
        visattn.page(samples.pictures, maps, path, heats=heats, names=names, labels=labels)
        chromium = shutil.which("chromium")
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        tab = browser.new_page(viewport=WINDOW)
        tab.goto(path.resolve().as_uri())
        tab.wait_for_function("state.view")
        tab.wait_for_timeout(500)
        tab.screenshot(path=ASSETS / "page.png")
        browser.close()


def main(run: str) -> None:
    classifier = visattn.load_classifier(run)
    data = PlacedCharacters("val", image_size=classifier.transform.image_size)
    draw_methods(classifier, data)
    draw_heads(classifier, data)
    draw_page(classifier, data)


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "runs/synthetic")
