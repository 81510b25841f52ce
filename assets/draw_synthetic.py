"""Draw assets/synthetic.png: where the letter is, and where four methods say that the model looked.

Run from the project's folder, after training: uv run assets/draw_synthetic.py runs/synthetic
"""

import sys
from pathlib import Path

import torch
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

import visattn
from visattn.data.synthetic import PlacedCharacters

ASSETS = Path(__file__).parent
METHODS = ("rollout", "gae", "legrad", "gradcam")
SHOWN = range(4)  # the first validation images, one of each of four letters


def main(run: str) -> None:
    classifier = visattn.load(run)
    data = PlacedCharacters("val", image_size=classifier.transform.image_size)
    pictures, labels = zip(*(data[i] for i in SHOWN), strict=True)
    images = torch.stack([classifier.transform(picture) for picture in pictures])
    probabilities = classifier(list(pictures))
    maps = {name: visattn.explain(classifier.model, images, torch.tensor(labels), name) for name in METHODS}
    figure = Figure(figsize=(9.4, 1.75 * len(pictures) + 0.3), dpi=110, facecolor="white", layout="constrained")
    grid = figure.subplots(len(pictures), 1 + len(METHODS))
    for row, picture in enumerate(pictures):
        label, found = data.classes[labels[row]], int(probabilities[row].argmax())
        grid[row, 0].imshow(picture)
        grid[row, 0].set_ylabel(f"{label}\nread as {data.classes[found]} {probabilities[row, found]:.0%}", fontsize=8)
        for column, heat in enumerate(maps.values(), 1):
            values = heat[row].resize(picture.size[::-1]).values
            shown = grid[row, column].imshow(values, cmap="inferno", vmin=0, vmax=heat.values.max().item())
            grid[row, column].contour(picture.convert("L"), levels=[128], colors="white", linewidths=0.5)
            if row == len(pictures) - 1:
                figure.colorbar(shown, ax=grid[:, column], location="bottom", fraction=0.03, pad=0.01, format="%.2g")
        top, left, bottom, right = data.box(row)
        for axes in grid[row]:
            frame = Rectangle((left - 0.5, top - 0.5), right - left, bottom - top, fill=False, ec="#22c55e", lw=2)
            axes.add_patch(frame)
            axes.set(xticks=[], yticks=[])
    for axes, name in zip(grid[0], ("image, letter framed", *METHODS), strict=True):
        axes.set_title(name, fontsize=9)
    figure.savefig(ASSETS / "synthetic.png")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "runs/synthetic")
