"""What is measured of a classifier's answers, by torchmetrics, and the table of single classes."""

import csv
from pathlib import Path

from torch import Tensor
from torchmetrics import MetricCollection
from torchmetrics.classification import (
    MulticlassAccuracy,
    MulticlassCalibrationError,
    MulticlassConfusionMatrix,
    MultilabelAccuracy,
    MultilabelAveragePrecision,
    MultilabelF1Score,
)


def measures(classes: int, multilabel: bool = False) -> MetricCollection:
    """Return what takes probabilities (B, C) and labels: (B,), or (B, C) where an image may have several."""
    if multilabel:
        chosen = {
            "map": MultilabelAveragePrecision(classes),
            "accuracy": MultilabelAccuracy(classes, average="micro"),
            "f1": MultilabelF1Score(classes),
        }
    else:
        chosen = {"accuracy": MulticlassAccuracy(classes, average="micro")}
        if classes > 5:
            chosen["top5"] = MulticlassAccuracy(classes, top_k=5, average="micro")
        chosen["ece"] = MulticlassCalibrationError(classes, n_bins=15)
    return MetricCollection(chosen, compute_groups=False)


def confusion(classes: int, multilabel: bool = False) -> MulticlassConfusionMatrix | None:
    """Return what counts which class was taken for which, where an image has one class."""
    return None if multilabel else MulticlassConfusionMatrix(classes)


def write_classes(matrix: Tensor, classes: list[str], path: Path) -> None:
    """Write a line per class: its images, precision, recall, F1 and what it is most often taken for."""
    with path.open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(("class", "images", "precision", "recall", "f1", "most_often_taken_for"))
        for number, name in enumerate(classes):
            right, images = int(matrix[number, number]), int(matrix[number].sum())
            said = int(matrix[:, number].sum())
            precision, recall, f1 = (
                right / max(said, 1),
                right / max(images, 1),
                2 * right / max(images + said, 1),
            )
            wrong = matrix[number].clone()
            wrong[number] = 0
            other = classes[int(wrong.argmax())] if wrong.any() else ""
            rows.writerow((name, images, f"{precision:.4f}", f"{recall:.4f}", f"{f1:.4f}", other))
