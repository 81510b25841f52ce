"""Localization: does the map lie where the truth is known to be?"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visattn.map import Map
from visattn.methods.explain import explain_or_zeros
from visattn.methods.target import check_images
from visattn.metrics.pixels import at_size


class Segmentation(NamedTuple):
    """Three measures (B,): pixel accuracy, mean IoU of object and ground, average precision."""

    pixel_accuracy: Tensor
    iou: Tensor
    average_precision: Tensor


def pointing_game(
    heat: Map | Tensor,
    truth: Tensor,
    tolerance: float = 15,
) -> Tensor:
    """Return 1 where the hottest pixel lies on the object or near it, else 0: (B,).

    Args:
        heat: Map or (B, h, w); it is resized to the masks.
        truth: (B, H, W) bool masks; `boxes_to_masks` makes them of boxes.
        tolerance: Largest distance from the object, in pixels.

    Reference:
        Zhang et al. 2016, "Top-down Neural Attention by Excitation Backprop",
        https://arxiv.org/abs/1608.00507. Differs from: nothing; the mean over images of one class,
        then over classes, is the caller's.
    """
    values, truth = _paired(heat, truth)
    _, height, width = truth.shape
    hottest = values.flatten(1).argmax(1)[:, None]  # (B, 1), of H W pixels
    y = torch.arange(height, device=truth.device)
    x = torch.arange(width, device=truth.device)
    # distances of all rows and columns from the hottest pixel
    down = y - hottest // width  # (B, H)
    across = x - hottest % width  # (B, W)
    # (B, H, 1) + (B, 1, W) -> (B, H, W)
    distance_squared = down[:, :, None] ** 2 + across[:, None] ** 2
    is_near = distance_squared <= tolerance**2
    return (truth & is_near).flatten(1).any(1).float()


def energy_pointing(heat: Map | Tensor, truth: Tensor) -> Tensor:
    """Return the share of the map's positive mass that lies on the object: (B,).

    Arguments as `pointing_game`.

    Reference:
        Wang et al. 2020, "Score-CAM", https://arxiv.org/abs/1910.01279. Differs from: nothing.
    """
    values, truth = _paired(heat, truth)
    values = values.clamp(min=0)
    smallest = torch.finfo(values.dtype).tiny
    mass = values.sum((1, 2)).clamp(min=smallest)
    return (values * truth).sum((1, 2)) / mass


def segmentation(heat: Map | Tensor, truth: Tensor) -> Segmentation:
    """Cut the map at its own mean and compare it with the masks; arguments as `pointing_game`.

    Reference:
        Chefer, Gur, Wolf 2021, section 4, https://arxiv.org/abs/2012.09838. Differs from the
        authors' code in: values per image, whose mean the caller takes.
    """
    values, truth = _paired(heat, truth)
    values = values.flatten(1)
    truth = truth.flatten(1)
    guess = values > values.mean(1, keepdim=True)
    accuracy = (guess == truth).float().mean(1)
    object_iou = _overlap(guess, truth)
    ground_iou = _overlap(~guess, ~truth)
    mean_iou = torch.stack([object_iou, ground_iou]).mean(0)
    precisions = map(_average_precision, values, truth)
    return Segmentation(accuracy, mean_iou, torch.stack(list(precisions)))


def grid_pointing(
    model: nn.Module,
    images: Tensor,
    target: Tensor,
    method: str = "gae",
    layers=None,
    *,
    shrink: bool = True,
) -> Tensor:
    """Join four images of four classes, explain each class, and return the mass in its own cell.

    Args:
        model: Network of logits.
        images: (B, C, H, W), B a multiple of 4: consecutive images make one picture.
        target: (B,) their classes, four different ones in each picture.
        method: A name in METHODS.
        layers: As in `visattn.explain`.
        shrink: Shrink the picture to (H, W), for networks of one image size.

    Returns:
        (B,) shares; 0.25 is what a flat map gets, 0 one without positive values.

    Reference:
        Böhle, Fritz, Schiele 2021, "Convolutional Dynamic Alignment Networks",
        https://arxiv.org/abs/2104.00032. Differs from the paper in: the picture can be shrunk to
        the size the model takes.
    """
    check_images(images)
    target = torch.as_tensor(target, device=images.device)
    count = len(images)
    if count % 4 or target.shape != (count,):
        raise ValueError(
            f"images must come in fours, with one class each; got {count} and {tuple(target.shape)}"
        )
    classes = target.view(-1, 4)  # of the four cells of each picture
    if any(len(four.unique()) < 4 for four in classes):
        raise ValueError("target must hold four different classes in every four images")
    pictures = _join_fours(images)
    if shrink:
        size = images.shape[2:]
        pictures = F.interpolate(
            pictures, size, mode="bilinear", align_corners=False, antialias=True
        )
    shares = []
    for cell in range(4):
        heat = explain_or_zeros(model, pictures, classes[:, cell], method, layers)
        truth = _mask_of_cell(cell, pictures)
        shares.append(energy_pointing(heat, truth).cpu())
    return torch.stack(shares, 1).flatten()  # 4 x (B / 4,) -> (B,)


def _join_fours(images: Tensor) -> Tensor:
    """Join every four images to one of two rows: (B, C, H, W) -> (B / 4, C, 2 H, 2 W)."""
    fours = images.unflatten(0, (-1, 2, 2))  # (B / 4, row, column, C, H, W)
    by_axis = fours.permute(0, 3, 1, 4, 2, 5)  # (B / 4, C, row, H, column, W)
    return by_axis.flatten(4, 5).flatten(2, 3)


def _mask_of_cell(cell: int, pictures: Tensor) -> Tensor:
    """Return one quarter of every picture, counted row by row, as a mask: (B, H, W)."""
    cells = torch.zeros(4)
    cells[cell] = 1
    size = pictures.shape[2:]
    mask = F.interpolate(cells.view(1, 1, 2, 2), size)[0].bool()  # (1, H, W)
    return mask.expand(len(pictures), -1, -1).to(pictures.device)


def boxes_to_masks(boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Return masks (B, H, W) of one box per image.

    ``boxes`` (B, 4) holds x0, y0, x1, y1 in pixels; the pixels at x1 and y1 lie outside.
    """
    height, width = size
    y = torch.arange(height)
    x = torch.arange(width)
    x0, y0, x1, y1 = boxes[:, :, None].unbind(1)  # 4 x (B, 1)
    rows = (y >= y0) & (y < y1)  # (B, H)
    columns = (x >= x0) & (x < x1)  # (B, W)
    return rows[:, :, None] & columns[:, None]


def _paired(heat: Map | Tensor, truth: Tensor) -> tuple[Tensor, Tensor]:
    """Return the map at the size of the masks, and the masks: both (B, H, W), on one device."""
    if truth.ndim != 3 or truth.dtype != torch.bool:
        raise ValueError(
            f"truth must be bool masks (B, H, W); got {tuple(truth.shape)} {truth.dtype}"
        )
    is_empty = ~truth.flatten(1).any(1)
    if is_empty.any():
        numbers = is_empty.nonzero().flatten().tolist()
        raise ValueError(f"truth must mark something in every image; empty: {numbers}")
    batch, height, width = truth.shape
    values = at_size(heat, (height, width), batch)
    return values.to(truth.device), truth


def _overlap(a: Tensor, b: Tensor) -> Tensor:
    """Return the intersection over the union of masks (B, N): (B,), 1 where both are empty."""
    union = (a | b).sum(1)
    intersection = (a & b).sum(1)
    ratio = intersection / union.clamp(min=1)
    return torch.where(union == 0, 1.0, ratio)


def _average_precision(values: Tensor, truth: Tensor) -> Tensor:
    """Return the area under precision over recall; pixels of equal value count together."""
    order = values.argsort(descending=True)
    values = values[order]
    hits = truth[order].cumsum(0)
    # the last pixel of every run of equal values
    changes = values[1:] != values[:-1]
    is_last = torch.cat([changes, changes.new_ones(1)])
    last = is_last.nonzero()[:, 0]
    precision = hits[last] / (last + 1)
    recall = hits[last] / hits[-1]
    gained_recall = recall.diff(prepend=recall.new_zeros(1))
    return (precision * gained_recall).sum()
