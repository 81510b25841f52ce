"""Draw assets/hero.png from a run of the quickstart: characters, and what the model looked at.

Run from the project's folder, after the quickstart: uv run assets/draw_maps.py runs/quickstart
"""

import io
import sys
import zipfile
from pathlib import Path

import torch
from matplotlib.figure import Figure
from PIL import Image

import visattn

ASSETS = Path(__file__).parent
METHODS = {
    "raw": "attention of the class token",
    "rollout": "rollout",
    "gae": "GAE for the predicted class",
}


def characters(per_class: int = 2) -> dict[str, Image.Image]:
    """Return the first validation images of each writing system, by file name."""
    chosen = {}
    with zipfile.ZipFile(ASSETS / "writing_systems.zip") as archive:
        names = sorted(
            name for name in archive.namelist() if "val/" in name and name.endswith(".png")
        )
        for folder in sorted({name.rsplit("/", 1)[0] for name in names}):
            inside = [name for name in names if name.startswith(folder + "/")]
            for name in inside[:: max(1, len(inside) // per_class)][:per_class]:
                chosen[name] = Image.open(io.BytesIO(archive.read(name))).convert("RGB")
    return chosen


def main(run: str) -> None:
    classifier, files = visattn.load_classifier(run), characters()
    images = torch.stack([classifier.transform(image) for image in files.values()])
    probabilities = classifier(list(files.values()))
    maps = {method: visattn.explain(classifier.model, images, method=method) for method in METHODS}
    figure = Figure(figsize=(12.5, 5.4), dpi=110, facecolor="white", layout="constrained")
    grid = figure.subplots(1 + len(METHODS), len(files))
    for column, (name, image) in enumerate(files.items()):
        best = int(probabilities[column].argmax())
        truth = name.split("/")[-2].replace("_", " ")
        right = "" if classifier.classes[best].replace("_", " ") == truth else f"\nnot {truth}"
        label = (
            f"{classifier.classes[best].replace('_', ' ')} {probabilities[column, best]:.0%}{right}"
        )
        grid[0, column].imshow(image)
        grid[0, column].set_title(label, fontsize=8)
        for row, (method, heat) in enumerate(maps.items(), 1):
            high = heat.values.max().item()
            values = heat[column].resize(image.size[::-1]).values
            shown = grid[row, column].imshow(values, cmap="inferno", vmin=0, vmax=high)
            grid[row, column].contour(
                image.convert("L"), levels=[128], colors="white", linewidths=0.5
            )
            if column == len(files) - 1:
                figure.colorbar(shown, ax=grid[row, :], fraction=0.012, pad=0.01)
            if column == 0:
                grid[row, 0].set_ylabel(
                    METHODS[method].replace(" for", "\nfor").replace(" of", "\nof"), fontsize=8
                )
    for axes in grid.flat:
        axes.set_xticks([])
        axes.set_yticks([])
        axes.set_frame_on(False)
    figure.savefig(ASSETS / "hero.png")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "runs/quickstart")
