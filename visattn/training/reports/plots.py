"""The two pictures every run leaves: its curves and its confusion matrix."""

from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

NAMES = {"train": "training (augmented images)", "val": "validation"}


def draw_curves(rows: list[dict], path: Path) -> None:
    """Draw loss and accuracy of training and validation over the steps.

    Training's loss is the plain one where it was logged: without smoothing and weights, as
    validation's is. Of mixed images it is the loss against their mixed targets, and there is no
    accuracy.
    """
    figure = Figure(figsize=(9, 3.5), layout="constrained")
    FigureCanvasAgg(figure)
    for axis, quantity in zip(figure.subplots(1, 2), ("loss", "accuracy"), strict=True):
        for split, style in (
            ("train", {"alpha": 0.5, "linewidth": 1}),
            ("val", {"marker": ".", "linewidth": 1.5}),
        ):
            plain = f"{split}_plain_{quantity}"
            key = plain if any(plain in row for row in rows) else f"{split}_{quantity}"
            points = [(row["step"], row[key]) for row in rows if key in row]
            if points:
                axis.plot(*zip(*points, strict=True), label=NAMES[split], **style)
                axis.legend(frameon=False)
        axis.set(xlabel="step", ylabel=quantity)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)


def draw_rates(rates: list[float], losses: list[float], chosen: float | None, path: Path) -> None:
    """Draw the loss of a range test over the learning rate, and the rate chosen."""
    figure = Figure(figsize=(5, 3.5), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    axis.plot(rates, losses, linewidth=1.5)
    if chosen is not None:
        axis.axvline(chosen, color="C1", linestyle="--", label=f"{chosen:.2g}")
        axis.legend(frameon=False)
    axis.set(xlabel="learning rate", ylabel="smoothed loss", xscale="log")
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)


def draw_confusion(matrix: Tensor, classes: list[str], path: Path) -> None:
    """Draw the confusion matrix (rows: true class); counts are written in where there is room for them."""
    count = len(classes)
    side = min(12.0, 2.5 + 0.5 * count)
    figure = Figure(figsize=(side, side), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    shares = matrix.float() / matrix.sum(1, keepdim=True).clamp(min=1)
    axis.imshow(shares.numpy(), cmap="Blues", vmin=0, vmax=1)
    axis.set(xlabel="predicted", ylabel="true")
    if count <= 40:
        axis.set_xticks(range(count), classes, rotation=45, ha="right")
        axis.set_yticks(range(count), classes)
    if count <= 20:
        for row in range(count):
            for column in range(count):
                ink = "white" if shares[row, column] > 0.5 else "black"
                axis.text(
                    column, row, int(matrix[row, column]), ha="center", va="center", color=ink
                )
    figure.savefig(path, dpi=120)
