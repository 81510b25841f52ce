"""Faithfulness: what becomes of the score when pixels go, or come, in the order of the map."""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visattn.map import Map, resized
from visattn.methods.target import Target, check_images, evaluating, logits_of, scores_of

_BLUR_RADIUS, _BLUR_SIGMA = 5, 5.0  # the 11-pixel kernel of RISE


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
    r"""Remove pixels, the hottest first, and return the area under the probability of the target: low is good.

    .. math::
        \text{deletion} = \int_0^1 p_t\bigl(x \text{ with the hottest share } a \text{ replaced}\bigr)\, da

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
    curve = _curve(model, images, blank, heat, target, _shares(steps), batch_size, images)
    return curve if return_curve else torch.trapezoid(curve, dx=1 / steps)


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
    """Sharpen a blurred image, the hottest pixels first, and return the area under the probability: high is good.

    As `deletion`, from the same paper; the start is the image blurred by a Gaussian of 5 pixels.
    """
    curve = _curve(
        model, _blurred(images), images, heat, target, _shares(steps), batch_size, images
    )
    return curve if return_curve else torch.trapezoid(curve, dx=1 / steps)


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
    """Blank 10 to 90 % of the pixels and return the area under "is the target still the first class?".

    ``positive=True`` blanks the hottest pixels first (low is good), False the coldest (high is
    good).

    Reference:
        Chefer, Gur, Wolf 2021, section 4, https://arxiv.org/abs/2012.09838. Differs from the paper
        in: the area is divided by its width, so that it lies in [0, 1].
    """
    if steps < 2:
        raise ValueError(f"steps must be at least 2; got {steps}")
    negative = replace(heat, values=-heat.values) if isinstance(heat, Map) else -heat
    shares = torch.linspace(0.1, 0.9, steps, dtype=torch.double)
    blank, order = torch.zeros_like(images), heat if positive else negative
    curve = _curve(model, images, blank, order, target, shares, batch_size, images, hits=True)
    return curve if return_curve else torch.trapezoid(curve, dx=1 / (steps - 1))


def at_size(heat: Map | Tensor, size: tuple[int, int], batch: int) -> Tensor:
    """Return the values of a map (B, H, W) at another size, checked."""
    values = heat.values if isinstance(heat, Map) else heat
    values = values[None] if values.ndim == 2 else values
    if values.ndim != 3 or len(values) != batch:
        raise ValueError(
            f"heat must be one map per image, ({batch}, h, w); got {tuple(values.shape)}"
        )
    if not values.isfinite().all():
        raise ValueError("heat must be finite; got NaN or infinity")
    lattice = heat.lattice if isinstance(heat, Map) else None
    if tuple(values.shape[1:]) == tuple(size) and lattice is None:
        return values
    return resized(values.float(), size, lattice)


def _shares(steps: int) -> Tensor:
    if steps < 1:
        raise ValueError(f"steps must be at least 1; got {steps}")
    return torch.linspace(0, 1, steps + 1, dtype=torch.double)


@torch.no_grad()
def _curve(
    model, before, after, heat, target, shares, batch_size, images, hits: bool = False
) -> Tensor:
    """Return (B, shares): the target's probability (or being first) with that share of pixels from ``after``."""
    check_images(images)
    batch, pixels = len(images), images.shape[2] * images.shape[3]
    values = at_size(heat, images.shape[2:], batch).flatten(1).to(images.device)
    rank = (
        values.argsort(dim=1, descending=True, stable=True)
        .argsort(dim=1)
        .view(batch, 1, *images.shape[2:])
    )
    counts = (shares * pixels).round().long().to(images.device)
    found = []
    with evaluating(model):
        classes = scores_of(
            torch.cat([logits_of(model(x)) for x in images.split(batch_size)]), target
        )[1]
        if classes is None:
            raise ValueError(
                "target must be a class, a tensor of classes or None: this measure needs a probability"
            )
        for pairs in torch.arange(batch * len(shares), device=images.device).split(batch_size):
            image, step = pairs // len(shares), pairs % len(shares)
            mixed = torch.where(
                rank[image] < counts[step].view(-1, 1, 1, 1), after[image], before[image]
            )
            logits, wanted = logits_of(model(mixed)).float(), classes[image]
            of_target = logits.softmax(1).gather(1, wanted[:, None])[:, 0]
            found.append((logits.argmax(1) == wanted).float() if hits else of_target)
    return torch.cat(found).view(batch, len(shares))


def _blurred(images: Tensor) -> Tensor:
    at = torch.arange(-_BLUR_RADIUS, _BLUR_RADIUS + 1, device=images.device, dtype=images.dtype)
    kernel = (-(at**2) / (2 * _BLUR_SIGMA**2)).exp()
    kernel, channels = kernel / kernel.sum(), images.shape[1]
    x = F.pad(images, (_BLUR_RADIUS,) * 4, mode="replicate")
    x = F.conv2d(x, kernel.view(1, 1, 1, -1).expand(channels, -1, -1, -1), groups=channels)
    return F.conv2d(x, kernel.view(1, 1, -1, 1).expand(channels, -1, -1, -1), groups=channels)
