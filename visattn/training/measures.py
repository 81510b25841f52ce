"""What is measured of a classifier's answers, by torchmetrics, and the table of single classes."""

import csv
from pathlib import Path

from torch import Tensor
from torchmetrics import Metric, MetricCollection
from torchmetrics.classification import (
    MulticlassAccuracy,
    MulticlassCalibrationError,
    MulticlassConfusionMatrix,
    MultilabelAccuracy,
    MultilabelAveragePrecision,
    MultilabelF1Score,
)

CLASS_FIELDS = ("class", "images", "precision", "recall", "f1", "most_often_taken_for")


def measures(classes: int, multilabel: bool = False) -> MetricCollection:
    """Return the metrics of probabilities (B, C) and labels: (B,), or (B, C) if ``multilabel``."""
    metrics: dict[str, Metric | MetricCollection] = {}
    if multilabel:
        metrics["map"] = MultilabelAveragePrecision(classes)
        metrics["accuracy"] = MultilabelAccuracy(classes, average="micro")
        metrics["f1"] = MultilabelF1Score(classes)
    else:
        metrics["accuracy"] = MulticlassAccuracy(classes, average="micro")
        if classes > 5:
            metrics["top5"] = MulticlassAccuracy(classes, top_k=5, average="micro")
        metrics["ece"] = MulticlassCalibrationError(classes, n_bins=15)
    return MetricCollection(metrics, compute_groups=False)


def confusion(classes: int, multilabel: bool = False) -> MulticlassConfusionMatrix | None:
    """Return the confusion matrix, where an image has one class."""
    if multilabel:
        return None
    return MulticlassConfusionMatrix(classes)


def write_classes(
    matrix: Tensor,
    classes: list[str],
    path: Path,
) -> None:
    """Write a line per class of a confusion matrix (C, C), rows: true class."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(CLASS_FIELDS)
        for number in range(len(classes)):
            writer.writerow(_describe_class(matrix, number, classes))


def _describe_class(
    matrix: Tensor,
    number: int,
    classes: list[str],
) -> tuple:
    """Return a class's name, images, precision, recall, F1 and what it is most often taken for."""
    right = int(matrix[number, number])
    images = int(matrix[number].sum())
    predicted = int(matrix[:, number].sum())
    precision = right / max(predicted, 1)
    recall = right / max(images, 1)
    f1 = 2 * right / max(images + predicted, 1)
    mistakes = matrix[number].clone()
    mistakes[number] = 0
    most_frequent = ""
    if mistakes.any():
        most_frequent = classes[int(mistakes.argmax())]
    scores = (f"{precision:.4f}", f"{recall:.4f}", f"{f1:.4f}")
    return (classes[number], images, *scores, most_frequent)
