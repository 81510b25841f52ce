"""Draw assets/hero.png from a run of the quickstart: characters, and maps of the model.

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
    "raw": "attention\nof the class token",
    "rollout": "rollout",
    "gae": "GAE\nfor the predicted class",
}


def read_characters(per_class: int = 2) -> dict[str, Image.Image]:
    """Return some validation images of each writing system, by file name."""
    names_of: dict[str, list[str]] = {}
    characters = {}
    with zipfile.ZipFile(ASSETS / "writing_systems.zip") as archive:
        for name in sorted(archive.namelist()):
            if "val/" in name and name.endswith(".png"):
                folder, _, _ = name.rpartition("/")
                names_of.setdefault(folder, []).append(name)
        for names in names_of.values():
            step = max(1, len(names) // per_class)
            for name in names[::step][:per_class]:
                content = io.BytesIO(archive.read(name))
                characters[name] = Image.open(content).convert("RGB")
    return characters


def describe_prediction(file: str, label: str, probability: float) -> str:
    """Return the predicted class and its probability, and the true class where it differs."""
    truth = file.split("/")[-2].replace("_", " ")
    prediction = label.replace("_", " ")
    if prediction == truth:
        return f"{prediction} {probability:.0%}"
    return f"{prediction} {probability:.0%}\nnot {truth}"


def main(run: str) -> None:
    classifier = visattn.load_classifier(run)
    characters = read_characters()
    images = torch.stack([classifier.transform(image) for image in characters.values()])
    probabilities = classifier(list(characters.values()))
    figure = Figure(figsize=(12.5, 5.4), dpi=110, facecolor="white", layout="constrained")
    grid = figure.subplots(1 + len(METHODS), len(characters))
    for column, (file, image) in enumerate(characters.items()):
        best = int(probabilities[column].argmax())
        probability = probabilities[column, best].item()
        title = describe_prediction(file, classifier.classes[best], probability)
        grid[0, column].imshow(image)
        grid[0, column].set_title(title, fontsize=8)
    for row, (method, caption) in enumerate(METHODS.items(), 1):
        heat = visattn.explain(classifier.model, images, method=method)
        high = heat.values.max().item()
        for column, image in enumerate(characters.values()):
            axes = grid[row, column]
            values = heat[column].resize((image.height, image.width)).values
            picture = axes.imshow(values, cmap="inferno", vmin=0, vmax=high)
            axes.contour(image.convert("L"), levels=[128], colors="white", linewidths=0.5)
        figure.colorbar(picture, ax=grid[row, :], fraction=0.012, pad=0.01)
        grid[row, 0].set_ylabel(caption, fontsize=8)
    for axes in grid.flat:
        axes.set_xticks([])
        axes.set_yticks([])
        axes.set_frame_on(False)
    figure.savefig(ASSETS / "hero.png")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "runs/quickstart")
