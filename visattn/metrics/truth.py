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


def pointing_game(heat: Map | Tensor, truth: Tensor, tolerance: float = 15) -> Tensor:
    """Return 1 where the hottest pixel lies on the object or near it, else 0: (B,).

    Args:
        heat: Map or (B, h, w); it is resized to the masks.
        truth: (B, H, W) bool masks; `boxes_to_masks` makes them of boxes.
        tolerance: Largest distance from the object, in pixels.

    Reference:
        Zhang et al. 2016, "Top-down Neural Attention by Excitation Backprop",
        https://arxiv.org/abs/1608.00507. Differs
        from: nothing; the mean over images of one class, then over classes, is the caller's.
    """
    values, truth = _paired(heat, truth)
    columns = truth.shape[2]
    hottest = values.flatten(1).argmax(1)
    y = torch.arange(truth.shape[1], device=truth.device)[None, :, None]
    x = torch.arange(columns, device=truth.device)[None, None]
    # distances of all pixels from the hottest: (B, H, 1) and (B, 1, W)
    down = y - (hottest // columns)[:, None, None]
    across = x - (hottest % columns)[:, None, None]
    near_hottest = down**2 + across**2 <= tolerance**2
    return (truth & near_hottest).flatten(1).any(1).float()


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
    overlaps = torch.stack([_overlap(guess, truth), _overlap(~guess, ~truth)])
    precision = torch.stack([_average_precision(v, t) for v, t in zip(values, truth, strict=True)])
    return Segmentation(accuracy, overlaps.mean(0), precision)


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
        https://arxiv.org/abs/2104.00032.
        Differs from the paper in: the picture can be shrunk to the size the model takes.
    """
    check_images(images)
    target = torch.as_tensor(target, device=images.device)
    if len(images) % 4 or target.shape != (len(images),):
        raise ValueError(
            "images must come in fours, with one class each; "
            f"got {len(images)} and {tuple(target.shape)}"
        )
    if any(len(four.unique()) < 4 for four in target.view(-1, 4)):
        raise ValueError("target must hold four different classes in every four images")
    height, width = images.shape[2:]
    top, bottom = images.unflatten(0, (-1, 2, 2)).unbind(1)
    picture = torch.cat([torch.cat(list(row.unbind(1)), 3) for row in (top, bottom)], 2)
    if shrink:
        picture = F.interpolate(
            picture, (height, width), mode="bilinear", align_corners=False, antialias=True
        )
    shares = torch.empty(len(images) // 4, 4)
    cells = torch.eye(4, dtype=torch.bool).view(4, 2, 2)
    for cell in range(4):
        heat = explain_or_zeros(model, picture, target.view(-1, 4)[:, cell], method, layers)
        inside = F.interpolate(cells[cell][None, None].float(), picture.shape[2:])[0].bool()
        shares[:, cell] = energy_pointing(
            heat, inside.expand(len(picture), -1, -1).to(images.device)
        ).cpu()
    return shares.flatten()


def boxes_to_masks(boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Return masks (B, H, W) of boxes (B, 4), one per image: x0, y0, x1, y1 with the end outside."""
    y = torch.arange(size[0])[None, :, None]
    x = torch.arange(size[1])[None, None]
    x0, y0, x1, y1 = (side[:, None, None] for side in boxes.unbind(1))
    return (x >= x0) & (x < x1) & (y >= y0) & (y < y1)


def _paired(heat: Map | Tensor, truth: Tensor) -> tuple[Tensor, Tensor]:
    if truth.ndim != 3 or truth.dtype != torch.bool:
        raise ValueError(
            f"truth must be bool masks (B, H, W); got {tuple(truth.shape)} {truth.dtype}"
        )
    empty = ~truth.flatten(1).any(1)
    if empty.any():
        raise ValueError(
            f"truth must mark something in every image; empty: {empty.nonzero().flatten().tolist()}"
        )
    batch, height, width = truth.shape
    return at_size(heat, (height, width), batch).to(truth.device), truth


def _overlap(a: Tensor, b: Tensor) -> Tensor:
    union = (a | b).sum(1)
    return torch.where(union == 0, 1.0, (a & b).sum(1) / union.clamp(min=1))


def _average_precision(values: Tensor, truth: Tensor) -> Tensor:
    """Return the area under precision over recall; pixels of equal value count together."""
    order = values.argsort(descending=True)
    values = values[order]
    hits = truth[order].cumsum(0)
    # the last pixel of every run of equal values
    changes = values[1:] != values[:-1]
    last = torch.cat([changes, changes.new_ones(1)]).nonzero()[:, 0]
    precision = hits[last] / (last + 1)
    recall = hits[last] / hits[-1]
    return (precision * recall.diff(prepend=recall.new_zeros(1))).sum()
