"""Draw where a model looks in a task whose true explanation is known: assets/synthetic.png, heads.png and page.png.

synthetic.png is where the letter is, and where methods say that the model looked; heads.png all
heads of all layers; page.png the interactive page in a headless Chromium, which Playwright drives.

Run from the project's folder, after training: uv run assets/draw_synthetic.py runs/synthetic
"""

import shutil
import sys
import tempfile
from pathlib import Path

import torch
from matplotlib.cm import ScalarMappable
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image
from playwright.sync_api import sync_playwright

import visattn
from visattn.data.synthetic import PlacedCharacters
from visattn.draw.grids import heads_by_layers
from visattn.training.classifier import Classifier

ASSETS = Path(__file__).parent
METHODS = ("raw", "rollout", "gae", "legrad", "gradcam", "hirescam")
SHOWN = range(4)  # the first validation images, one of each of four letters
WINDOW = {"width": 1120, "height": 700}


def draw_methods(classifier: Classifier, data: PlacedCharacters) -> None:
    pictures, labels = zip(*(data[i] for i in SHOWN), strict=True)
    images = torch.stack([classifier.transform(picture) for picture in pictures])
    probabilities = classifier(list(pictures))
    maps = {
        name: visattn.explain(classifier.model, images, torch.tensor(labels), name)
        for name in METHODS
    }
    figure = Figure(
        figsize=(1.72 * (1 + len(METHODS)), 1.75 * len(pictures) + 0.3),
        dpi=110,
        layout="constrained",
    )
    grid = figure.subplots(len(pictures), 1 + len(METHODS))
    for row, picture in enumerate(pictures):
        label, found = data.classes[labels[row]], int(probabilities[row].argmax())
        grid[row, 0].imshow(picture)
        grid[row, 0].set_ylabel(
            f"{label}\nread as {data.classes[found]} {probabilities[row, found]:.0%}", fontsize=8
        )
        for axes, heat in zip(grid[row, 1:], maps.values(), strict=True):
            values, largest = (
                heat[row].resize(picture.size[::-1]).values,
                heat[row].values.max().item(),
            )
            axes.imshow(values, cmap="inferno", vmin=0, vmax=largest)
            axes.contour(picture.convert("L"), levels=[128], colors="white", linewidths=0.5)
            note = {
                "transform": axes.transAxes,
                "bbox": {"fc": "black", "lw": 0, "alpha": 0.6, "pad": 1.5},
            }
            axes.text(
                0.97, 0.04, f"max {largest:.2g}", color="white", fontsize=7, ha="right", **note
            )
        _frame(grid[row], data.box(row))
    for axes, name in zip(grid[0], ("image, letter framed", *METHODS), strict=True):
        axes.set_title(name, fontsize=9)
    bar = figure.colorbar(
        ScalarMappable(cmap="inferno"), ax=grid, aspect=40, fraction=0.015, pad=0.01, ticks=[0, 1]
    )
    bar.set_ticklabels(["0", "max"], fontsize=8)
    figure.savefig(ASSETS / "synthetic.png")


def _frame(panels, box: tuple[int, int, int, int]) -> None:
    top, left, bottom, right = box
    for axes in panels:
        corner = (left - 0.5, top - 0.5)
        axes.add_patch(
            Rectangle(corner, right - left, bottom - top, fill=False, ec="#22c55e", lw=2)
        )
        axes.set(xticks=[], yticks=[])


def draw_heads(classifier: Classifier, data: PlacedCharacters) -> None:
    picture = data[0][0]
    with torch.no_grad(), visattn.capture(classifier.model) as maps:
        classifier.model(classifier.transform(picture)[None])
    large = picture.resize((256, 256), Image.Resampling.NEAREST)
    heads_by_layers(large, maps, tile=128).save(ASSETS / "heads.png")


def draw_page(classifier: Classifier, data: PlacedCharacters) -> None:
    pictures, labels = zip(*(data[i] for i in SHOWN), strict=True)
    images = torch.stack([classifier.transform(picture) for picture in pictures])
    with torch.no_grad(), visattn.capture(classifier.model) as maps:
        classifier.model(images)
    heats = {
        name: visattn.explain(classifier.model, images, torch.tensor(labels), name)
        for name in ("gae", "gradcam")
    }
    about = {
        "heats": heats,
        "names": [data.name(i) for i in SHOWN],
        "labels": [data.classes[n] for n in labels],
    }
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        file = visattn.page(list(pictures), maps, Path(folder) / "page.html", **about)
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox"]
        )
        tab = browser.new_page(viewport=WINDOW)
        tab.goto(file.resolve().as_uri())
        tab.wait_for_function("state.view")
        tab.wait_for_timeout(500)
        tab.screenshot(path=ASSETS / "page.png")
        browser.close()


def main(run: str) -> None:
    classifier = visattn.load_classifier(run)
    data = PlacedCharacters("val", image_size=classifier.transform.image_size)
    for draw in (draw_methods, draw_heads, draw_page):
        draw(classifier, data)


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "runs/synthetic")
