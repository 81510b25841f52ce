"""Sanity: a map must change when the model does, and must not when the image hardly does."""

import copy

import torch
from torch import Tensor, nn

from visattn.methods.explain import explain, explain_or_zeros
from visattn.methods.target import Target, check_images, frozen_evaluation, scores_of


def sanity(
    model: nn.Module,
    images: Tensor,
    target: Target = None,
    method: str = "gae",
    layers=None,
    *,
    steps: int = 5,
    seed: int = 0,
) -> Tensor:
    """Randomize the weights from the head down and return how alike the maps remain: it must fall.

    Args:
        model: Network of logits; it is copied, not changed.
        images: (B, C, H, W).
        target: As in `visattn.explain`; None is the class the unspoiled model predicts.
        method: A name in METHODS.
        layers: As in `visattn.explain`.
        steps: In how many steps all weights go, cascading from the last layer to the first.
        seed: Of the new weights: normal, with each tensor's own mean and standard deviation.

    Returns:
        (steps, B) rank correlations with the map of the unspoiled model, after each step; 0 where
        the map has become flat or empty.

    Reference:
        Adebayo et al. 2018, "Sanity Checks for Saliency Maps", https://arxiv.org/abs/1810.03292.
        Differs from the paper in: weights keep the moments of the trained ones in place of a fresh
        initialization, so that deep networks stay finite; parameters without spread (a norm's
        untrained ones) stay.
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1; got {steps}")
    target = _fixed(model, images, target)
    first = explain(model, images, target, method, layers).values
    spoiled = copy.deepcopy(model)
    parameters = list(spoiled.parameters())
    parameters.reverse()  # the head's first
    generator = torch.Generator().manual_seed(seed)
    correlations = []
    start = 0
    for step in range(1, steps + 1):
        stop = round(step * len(parameters) / steps)
        for parameter in parameters[start:stop]:
            _randomize(parameter, generator)
        start = stop
        heat = explain_or_zeros(spoiled, images, target, method, layers)
        correlations.append(rank_correlation(first, heat.values))
    return torch.stack(correlations)


def max_sensitivity(
    model: nn.Module,
    images: Tensor,
    target: Target = None,
    method: str = "gae",
    layers=None,
    *,
    radius: float = 0.02,
    samples: int = 10,
    seed: int = 0,
) -> Tensor:
    r"""Return the largest relative change of the map under small noise: (B,), low is good.

    .. math::
        \max_{\|d\|_\infty \le r} \|\Phi(x + d) - \Phi(x)\|_2 \,/\, \|\Phi(x)\|_2

    ``radius`` is r; the maximum is over ``samples`` uniform draws. The other arguments are those of
    `sanity`. A map of zeros that stays one has changed by 0, and one that does not by infinity.

    Reference:
        Yeh et al. 2019, "On the (In)fidelity and Sensitivity of Explanations",
        https://arxiv.org/abs/1901.09392. Differs from the paper in: divided by the norm of the
        map, as methods differ in scale.
    """
    if radius <= 0 or samples < 1:
        raise ValueError(
            f"radius must be positive and samples at least 1; got {radius} and {samples}"
        )
    target = _fixed(model, images, target)
    clean = explain(model, images, target, method, layers)
    clean_values = clean.values.flatten(1)  # (B, h, w) -> (B, h w)
    clean_norm = clean_values.norm(dim=1)
    generator = torch.Generator().manual_seed(seed)
    largest = torch.zeros_like(clean_norm)
    for _ in range(samples):
        uniform = torch.rand(images.shape, generator=generator) * 2 - 1  # in [-1, 1)
        noisy = images + uniform.to(images) * radius
        heat = explain_or_zeros(model, noisy, target, method, layers)
        difference = heat.values.flatten(1) - clean_values
        change = difference.norm(dim=1)
        relative = torch.where(change == 0, 0, change / clean_norm)
        largest = torch.maximum(largest, relative)
    return largest


def rank_correlation(a: Tensor, b: Tensor) -> Tensor:
    """Return Spearman's correlation of two maps (B, h, w) per image: (B,).

    Equal values share their rank.
    """
    if a.shape != b.shape:
        raise ValueError(
            f"both maps must be of one shape; got {tuple(a.shape)} and {tuple(b.shape)}"
        )
    x = _centered_ranks(a)
    y = _centered_ranks(b)
    norms = x.norm(dim=1) * y.norm(dim=1)
    products = (x * y).sum(1)
    correlation = products / norms.clamp(min=1e-30)
    return torch.where(norms == 0, 0.0, correlation).float()


def _centered_ranks(maps: Tensor) -> Tensor:
    """Return the rank of every value within its map, less the mean rank: (B, h w)."""
    flat = maps.flatten(1)  # (B, h, w) -> (B, h w)
    ranks = torch.stack([_ranks(values) for values in flat])
    return ranks - ranks.mean(1, keepdim=True)


def _ranks(values: Tensor) -> Tensor:
    """Return the rank of every value, the mean of the ranks where values are equal."""
    _, place, count = values.unique(return_inverse=True, return_counts=True)
    mean_rank = count.cumsum(0) - (count - 1) / 2  # of each different value
    return mean_rank.double()[place]


def _fixed(
    model: nn.Module,
    images: Tensor,
    target: Target,
) -> Target:
    """Return the target as classes of the unspoiled model, so that later maps explain the same."""
    check_images(images)
    if callable(target):
        return target
    with frozen_evaluation(model), torch.no_grad():
        return scores_of(model(images), target)[1]


@torch.no_grad()
def _randomize(parameter: Tensor, generator: torch.Generator) -> None:
    deviation = parameter.float().std(correction=0)
    if deviation > 0:
        # drawn on the CPU, so that a seed means the same on every device
        noise = torch.randn(parameter.shape, generator=generator)
        mean = parameter.float().mean()
        parameter.copy_(mean + deviation * noise.to(parameter.device))
