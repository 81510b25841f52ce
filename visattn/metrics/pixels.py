"""Faithfulness: what becomes of the score when pixels go, or come, in the order of the map."""

from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visattn.map import Map, resized
from visattn.methods.target import Target, check_images, frozen_evaluation, logits_of, scores_of

# the 11-pixel kernel of RISE
_BLUR_RADIUS = 5
_BLUR_SIGMA = 5.0


def deletion(
    model: nn.Module,
    images: Tensor,
    heat: Map | Tensor,
    target: Target = None,
    steps: int = 100,
    *,
    baseline: float = 0.0,
    batch_size: int = 64,
    return_curve: bool = False,
) -> Tensor:
    r"""Remove pixels, the hottest first; return the area under the probability of the target.

    Low is good.

    .. math::
        \text{deletion} =
        \int_0^1 p_t\bigl(x \text{ with the hottest share } a \text{ replaced}\bigr)\, da

    Args:
        model: Network of logits (B, classes).
        images: (B, C, H, W), as the model takes them.
        heat: Map or (B, h, w); it is resized to the images. Hot is high.
        target: A class, a tensor of classes (B,), or None for the class predicted on the whole
            image.
        steps: In how many steps all pixels go; the area is the trapezoid rule's.
        baseline: Value a removed pixel gets; 0 is the mean color of normalized images.
        batch_size: Images per forward pass; steps and images share it.
        return_curve: Return the probabilities (B, steps + 1) in place of the area.

    Returns:
        (B,) areas in [0, 1], or the curves.

    Reference:
        Petsiuk, Das, Saenko 2018, "RISE", https://arxiv.org/abs/1806.07421. Differs from the
        authors' code in: steps are equal shares of the pixels at any image size.
    """
    blank = torch.full_like(images, baseline)
    replacement = _Replacement(images, blank, _shares(steps))
    curve = _curve(model, images, replacement, heat, target, batch_size)
    if return_curve:
        return curve
    return torch.trapezoid(curve, dx=1 / steps)


def insertion(
    model: nn.Module,
    images: Tensor,
    heat: Map | Tensor,
    target: Target = None,
    steps: int = 100,
    *,
    batch_size: int = 64,
    return_curve: bool = False,
) -> Tensor:
    """Sharpen a blurred image, the hottest pixels first; return the area under the probability.

    High is good. As `deletion`, from the same paper; the start is the image blurred by a Gaussian
    of 5 pixels.
    """
    replacement = _Replacement(_blurred(images), images, _shares(steps))
    curve = _curve(model, images, replacement, heat, target, batch_size)
    if return_curve:
        return curve
    return torch.trapezoid(curve, dx=1 / steps)


def perturbation(
    model: nn.Module,
    images: Tensor,
    heat: Map | Tensor,
    target: Target = None,
    steps: int = 9,
    *,
    positive: bool = True,
    batch_size: int = 64,
    return_curve: bool = False,
) -> Tensor:
    """Blank 10 to 90 % of the pixels; return the area under "is the target still the first class?".

    ``positive=True`` blanks the hottest pixels first (low is good), False the coldest (high is
    good).

    Reference:
        Chefer, Gur, Wolf 2021, section 4, https://arxiv.org/abs/2012.09838. Differs from the paper
        in: the area is divided by its width, so that it lies in [0, 1].
    """
    if steps < 2:
        raise ValueError(f"steps must be at least 2; got {steps}")
    if not positive:
        heat = _negated(heat)
    shares = torch.linspace(0.1, 0.9, steps, dtype=torch.double)
    blank = torch.zeros_like(images)
    replacement = _Replacement(images, blank, shares)
    curve = _curve(model, images, replacement, heat, target, batch_size, hits=True)
    if return_curve:
        return curve
    return torch.trapezoid(curve, dx=1 / (steps - 1))


def at_size(
    heat: Map | Tensor,
    size: tuple[int, int],
    batch: int,
) -> Tensor:
    """Return the values of a map (B, H, W) at another size, checked."""
    if isinstance(heat, Tensor):
        heat = Map(heat)
    values = heat.values
    if values.ndim == 2:
        values = values[None]  # (h, w) -> (1, h, w)
    if values.ndim != 3 or len(values) != batch:
        raise ValueError(
            f"heat must be one map per image, ({batch}, h, w); got {tuple(values.shape)}"
        )
    if not values.isfinite().all():
        raise ValueError("heat must be finite; got NaN or infinity")
    has_size = tuple(values.shape[1:]) == tuple(size)
    if has_size and heat.lattice is None:
        return values
    return resized(values.float(), size, heat.lattice)


class _Replacement(NamedTuple):
    """Images whose pixels are replaced, share by share, in the order of a map.

    Args:
        before, after: (B, C, H, W) without and with all pixels replaced.
        shares: The shares of pixels at which the model is asked, in [0, 1].
    """

    before: Tensor
    after: Tensor
    shares: Tensor


def _negated(heat: Map | Tensor) -> Map | Tensor:
    if isinstance(heat, Map):
        return replace(heat, values=-heat.values)
    return -heat


def _shares(steps: int) -> Tensor:
    if steps < 1:
        raise ValueError(f"steps must be at least 1; got {steps}")
    return torch.linspace(0, 1, steps + 1, dtype=torch.double)


@torch.no_grad()
def _curve(
    model: nn.Module,
    images: Tensor,
    replacement: _Replacement,
    heat: Map | Tensor,
    target: Target,
    batch_size: int,
    hits: bool = False,
) -> Tensor:
    """Return (B, shares): the probability of the target with that share of pixels replaced.

    ``hits=True`` returns 1 where the target is the first class and 0 elsewhere.
    """
    check_images(images)
    before, after, shares = replacement
    batch, _, height, width = images.shape
    rank = _ranks_of_pixels(heat, images)
    counts = (shares * height * width).round().long()  # of pixels
    counts = counts.to(images.device)
    results = []
    with frozen_evaluation(model):
        classes = _classes(model, images, target, batch_size)
        # every image with every share, numbered image by image
        pairs = torch.arange(batch * len(shares), device=images.device)
        for chunk in pairs.split(batch_size):
            image = chunk // len(shares)
            count = counts[chunk % len(shares)]
            is_replaced = rank[image] < count.view(-1, 1, 1, 1)
            mixed = torch.where(is_replaced, after[image], before[image])
            logits = logits_of(model(mixed)).float()
            results.append(_result(logits, classes[image], hits))
    return torch.cat(results).view(batch, len(shares))


def _ranks_of_pixels(heat: Map | Tensor, images: Tensor) -> Tensor:
    """Return the rank of every pixel, 0 for the hottest: (B, 1, H, W)."""
    batch, _, height, width = images.shape
    values = at_size(heat, (height, width), batch)
    flat = values.flatten(1).to(images.device)  # (B, H, W) -> (B, H W)
    order = flat.argsort(dim=1, descending=True, stable=True)
    rank = order.argsort(dim=1)
    return rank.view(batch, 1, height, width)


def _classes(
    model: nn.Module,
    images: Tensor,
    target: Target,
    batch_size: int,
) -> Tensor:
    outputs = []
    for chunk in images.split(batch_size):
        outputs.append(logits_of(model(chunk)))
    logits = torch.cat(outputs)  # (B, classes)
    _, classes = scores_of(logits, target)
    if classes is None:
        raise ValueError(
            "target must be a class, a tensor of classes or None: this measure needs a probability"
        )
    return classes


def _result(
    logits: Tensor,
    classes: Tensor,
    hits: bool,
) -> Tensor:
    """Return the probability of a class, or whether it is the first: (B, C) and (B,) to (B,)."""
    if hits:
        return (logits.argmax(1) == classes).float()
    probabilities = logits.softmax(1)
    return probabilities.gather(1, classes[:, None])[:, 0]


def _blurred(images: Tensor) -> Tensor:
    """Blur by a Gaussian, along rows and then along columns."""
    offsets = torch.arange(
        -_BLUR_RADIUS,
        _BLUR_RADIUS + 1,
        device=images.device,
        dtype=images.dtype,
    )
    exponent = -(offsets**2) / (2 * _BLUR_SIGMA**2)
    kernel = exponent.exp()
    kernel = kernel / kernel.sum()
    channels = images.shape[1]
    # one kernel per channel: (C, 1, 1, 11) along a row, (C, 1, 11, 1) along a column
    row_kernel = kernel.expand(channels, 1, 1, -1)
    column_kernel = row_kernel.transpose(2, 3)
    x = F.pad(images, (_BLUR_RADIUS,) * 4, mode="replicate")
    x = F.conv2d(x, row_kernel, groups=channels)
    return F.conv2d(x, column_kernel, groups=channels)
