"""The plots of a run: its curves, its confusion matrix and the range test of the learning rate."""

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

SPLIT_LABELS = {"train": "training (augmented images)", "val": "validation"}
SPLIT_STYLES: dict[str, dict[str, Any]] = {
    "train": {"alpha": 0.5, "linewidth": 1},
    "val": {"marker": ".", "linewidth": 1.5},
}

NAMED_CLASSES = 40  # most classes whose names are written beside the confusion matrix
COUNTED_CLASSES = 20  # most classes whose counts are written into it


def draw_curves(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw loss and accuracy of training and validation over the steps.

    Training's loss is the plain one where it was logged: without smoothing and weights, as
    validation's is. Of mixed images it is the loss against their mixed targets, and there is no
    accuracy.
    """
    figure = _new_figure(9, 3.5)
    for axis, quantity in zip(figure.subplots(1, 2), ("loss", "accuracy"), strict=True):
        for split, style in SPLIT_STYLES.items():
            key = f"{split}_plain_{quantity}"
            if not any(key in row for row in rows):
                key = f"{split}_{quantity}"
            logged = [row for row in rows if key in row]
            if logged:
                steps = [row["step"] for row in logged]
                values = [row[key] for row in logged]
                axis.plot(steps, values, label=SPLIT_LABELS[split], **style)
                axis.legend(frameon=False)
        axis.set(xlabel="step", ylabel=quantity)
        _hide_frame(axis)
    figure.savefig(path, dpi=120)


def draw_rates(
    rates: list[float],
    losses: list[float],
    best_rate: float | None,
    path: Path,
) -> None:
    """Draw the loss of a range test over the learning rate, and the suggested rate."""
    figure = _new_figure(5, 3.5)
    axis = figure.subplots()
    axis.plot(rates, losses, linewidth=1.5)
    if best_rate is not None:
        axis.axvline(best_rate, color="C1", linestyle="--", label=f"{best_rate:.2g}")
        axis.legend(frameon=False)
    axis.set(xlabel="learning rate", ylabel="smoothed loss", xscale="log")
    _hide_frame(axis)
    figure.savefig(path, dpi=120)


def draw_confusion(
    matrix: Tensor,
    classes: list[str],
    path: Path,
) -> None:
    """Draw the confusion matrix (rows: true class), with names and counts where there is room."""
    count = len(classes)
    inches = min(12.0, 2.5 + 0.5 * count)
    figure = _new_figure(inches, inches)
    axis = figure.subplots()
    shares = matrix.float() / matrix.sum(1, keepdim=True).clamp(min=1)  # of the true class
    axis.imshow(shares.numpy(), cmap="Blues", vmin=0, vmax=1)
    axis.set(xlabel="predicted", ylabel="true")
    if count <= NAMED_CLASSES:
        axis.set_xticks(range(count), classes, rotation=45, ha="right")
        axis.set_yticks(range(count), classes)
    if count <= COUNTED_CLASSES:
        _write_counts(axis, matrix, shares)
    figure.savefig(path, dpi=120)


def _write_counts(
    axis: Axes,
    matrix: Tensor,
    shares: Tensor,
) -> None:
    count = len(matrix)
    for row in range(count):
        for column in range(count):
            color = "black"
            if shares[row, column] > 0.5:  # a dark cell
                color = "white"
            text = str(int(matrix[row, column]))
            axis.text(column, row, text, ha="center", va="center", color=color)


def _new_figure(width: float, height: float) -> Figure:
    """Return a figure in inches that needs no display."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _hide_frame(axis: Axes) -> None:
    axis.spines[["top", "right"]].set_visible(False)
