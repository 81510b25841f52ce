"""The methods once more, slowly: whole N x N matrices, eager autograd, loops. Nothing here uses the library."""

import torch
from torch import Tensor


def softmax_maps(q: Tensor, k: Tensor) -> Tensor:
    scores = torch.einsum("bhqd,bhkd->bhqk", q, k) / q.shape[-1] ** 0.5
    weights = torch.exp(scores - scores.max(-1, keepdim=True).values)
    return weights / weights.sum(-1, keepdim=True)


def full_rollout(maps: list[Tensor], fuse=lambda a: a.mean(1)) -> Tensor:
    """maps: (B, H, N, N) first to last; the whole product (B, N, N)."""
    product = torch.eye(maps[0].shape[-1], dtype=maps[0].dtype)
    for alpha in maps:
        fused = fuse(alpha)
        fused = fused / fused.sum(-1, keepdim=True)
        product = (0.5 * fused + 0.5 * torch.eye(alpha.shape[-1], dtype=alpha.dtype)) @ product
    return product


def full_gae(maps: list[Tensor], gradients: list[Tensor]) -> Tensor:
    relevance = torch.eye(maps[0].shape[-1], dtype=maps[0].dtype)
    for alpha, gradient in zip(maps, gradients, strict=True):
        relevance = relevance + torch.relu(alpha * gradient).mean(1) @ relevance
    return relevance - torch.eye(maps[0].shape[-1], dtype=maps[0].dtype)


def full_grad_rollout(maps: list[Tensor], gradients: list[Tensor]) -> Tensor:
    eye = torch.eye(maps[0].shape[-1], dtype=maps[0].dtype)
    product = eye
    for alpha, gradient in zip(maps, gradients, strict=True):
        layer = torch.relu(alpha * gradient).mean(1) + eye
        product = layer / layer.sum(-1, keepdim=True) @ product
    return product


def attached_weights(model, images, target):
    """Return an eager model's attention weights and their gradients for one class per image, and the logits."""
    found, original = [], Tensor.softmax

    def softmax(x, dim=None, *args, **kwargs):
        output = original(x, dim, *args, **kwargs)
        if x.ndim > 2:
            found.append(output)
        return output

    Tensor.softmax = softmax
    try:
        logits = model(images)
    finally:
        Tensor.softmax = original
    score = sum(logits[b, target[b]] for b in range(len(images)))
    gradients = torch.autograd.grad(score, found)
    return (
        [alpha.detach().double() for alpha in found],
        [g.double() for g in gradients],
        logits.detach(),
    )


def window_place(y, x, grid, window, shift, pad_first):
    """Return (window, place in it) of one token, counting as a person would."""
    padded = [-(-side // window) * window for side in grid]
    around = padded if pad_first else grid
    y, x = (y - shift) % around[0], (x - shift) % around[1]
    return (y // window) * (padded[1] // window) + x // window, (y % window) * window + x % window


def grid_place(y, x, grid, parts):
    """Return (group, place in it) of one token in MaxViT's grid attention."""
    step = [side // parts for side in grid]
    return (y % step[0]) * step[1] + x % step[1], (y // step[0]) * parts + x // step[1]


def dense_from_groups(weights: Tensor, grid, place) -> Tensor:
    """Scatter window weights (B * G, H, T, T) into (B, N, N), heads averaged, for two images, by a loop over tokens."""
    tokens = [(y, x) for y in range(grid[0]) for x in range(grid[1])]
    spots = torch.tensor([place(y, x) for y, x in tokens])
    mean, batch = weights.mean(1), 2
    groups = len(mean) // batch
    dense = mean.new_zeros(batch, len(tokens), len(tokens))
    for b in range(batch):
        for i, (group, at) in enumerate(spots.tolist()):
            same = spots[:, 0] == group
            dense[b, i, same] = mean[b * groups + group, at, spots[same, 1]]
    return dense


def merge_matrix(coarse, fine) -> Tensor:
    """(coarse tokens, fine tokens): each parent shares its mass equally among its 2 x 2 children."""
    matrix = torch.zeros(coarse[0] * coarse[1], fine[0] * fine[1], dtype=torch.double)
    for y in range(fine[0]):
        for x in range(fine[1]):
            matrix[(y // 2) * coarse[1] + x // 2, y * fine[1] + x] = 1
    return matrix / matrix.sum(1, keepdim=True)
