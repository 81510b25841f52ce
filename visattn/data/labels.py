"""Labels: checked, counted, and split into training and validation."""

import numpy as np

from visattn.data.source import ImageSource


def check_labels(split: str, source: ImageSource) -> None:
    """Refuse class numbers that have no class, naming the first image that has one."""
    if source.labels.ndim > 1:
        return
    num_classes = len(source.classes)
    wrong = np.flatnonzero((source.labels < 0) | (source.labels >= num_classes))
    if len(wrong):
        first = int(wrong[0])
        raise ValueError(
            f"{split}: {len(wrong)} images have a label out of range, the first is image {first} "
            f"with {source.labels[first]}; there are {num_classes} classes, 0 to {num_classes - 1}"
        )


def check_same_classes(checkpoint_classes: list[str], data_classes: list[str]) -> None:
    """Refuse data whose classes are not those of a checkpoint, naming what differs."""
    if checkpoint_classes == data_classes:
        return
    missing = sorted(set(checkpoint_classes) - set(data_classes))
    extra = sorted(set(data_classes) - set(checkpoint_classes))
    difference = "the data have them in another order"
    if missing or extra:
        difference = (
            f"only in the checkpoint {missing or 'none'}, only in the data {extra or 'none'}"
        )
    raise ValueError(f"the checkpoint was trained on other classes: {difference}")


def class_counts(labels: np.ndarray, num_classes: int) -> list[int]:
    """Images of each class."""
    if labels.ndim > 1:
        return labels.sum(0).tolist()  # (N, C) -> (C,)
    return np.bincount(labels, minlength=num_classes).tolist()


def class_weights(counts: list[int]) -> list[float]:
    """Weights in inverse proportion to the counts, 0 for a class without images.

    Their mean over all images is 1.

    Example:
        >>> class_weights([10, 30])
        [2.0, 0.6666666666666666]
    """
    num_present = sum(count > 0 for count in counts)
    return [sum(counts) / (num_present * count) if count else 0.0 for count in counts]


def split_stratified(
    labels: np.ndarray, fraction: float, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Indices for training and for validation, which gets ``fraction`` of each class.

    A class of two images or more gives at least one to validation. Where an image may have several
    classes, ``fraction`` of all images is drawn regardless of them.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"val_fraction must lie between 0 and 1, got {fraction}")
    if labels.ndim > 1:
        groups = {0: np.arange(len(labels))}
    else:
        groups = {}
        for label in np.unique(labels):
            groups[int(label)] = np.flatnonzero(labels == label)
    train = []
    val = []
    for number, group in groups.items():
        generator = np.random.default_rng([seed, number])
        members = generator.permutation(group)
        num_val = max(1, round(len(members) * fraction))
        num_val = min(num_val, len(members) - 1)
        val.append(members[:num_val])
        train.append(members[num_val:])
    if not sum(map(len, val)):
        raise ValueError(
            "root: a class needs two images or more, one of them for validation; "
            "all classes have one"
        )
    train_indices = np.sort(np.concatenate(train))
    val_indices = np.sort(np.concatenate(val))
    return train_indices, val_indices
