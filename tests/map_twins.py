"""Slow twins of the methods: whole N x N matrices and loops; nothing of the library."""

import torch
from torch import Tensor


def softmax_maps(q: Tensor, k: Tensor) -> Tensor:
    scores = torch.einsum("bhqd,bhkd->bhqk", q, k) / q.shape[-1] ** 0.5
    weights = torch.exp(scores - scores.max(-1, keepdim=True).values)
    return weights / weights.sum(-1, keepdim=True)


def full_rollout(maps: list[Tensor], fuse=lambda a: a.mean(1)) -> Tensor:
    """Return the whole product (B, N, N) of maps (B, H, N, N), first to last."""
    eye = torch.eye(maps[0].shape[-1], dtype=maps[0].dtype)
    product = eye
    for alpha in maps:
        fused = fuse(alpha)
        fused = fused / fused.sum(-1, keepdim=True)
        layer = 0.5 * fused + 0.5 * eye
        product = layer @ product
    return product


def full_gae(maps: list[Tensor], gradients: list[Tensor]) -> Tensor:
    eye = torch.eye(maps[0].shape[-1], dtype=maps[0].dtype)
    relevance = eye
    for alpha, gradient in zip(maps, gradients, strict=True):
        positive = torch.relu(alpha * gradient).mean(1)
        relevance = relevance + positive @ relevance
    return relevance - eye


def full_grad_rollout(maps: list[Tensor], gradients: list[Tensor]) -> Tensor:
    eye = torch.eye(maps[0].shape[-1], dtype=maps[0].dtype)
    product = eye
    for alpha, gradient in zip(maps, gradients, strict=True):
        layer = torch.relu(alpha * gradient).mean(1) + eye
        product = layer / layer.sum(-1, keepdim=True) @ product
    return product


def attached_weights(model, images, target):
    """Return an eager model's attention weights, their gradients, and the logits.

    ``target`` is one class per image.
    """
    weights = []
    original = Tensor.softmax

    def softmax(x, dim=None, *args, **kwargs):
        output = original(x, dim, *args, **kwargs)
        if x.ndim > 2:
            weights.append(output)
        return output

    Tensor.softmax = softmax
    try:
        logits = model(images)
    finally:
        Tensor.softmax = original
    score = sum(logits[b, target[b]] for b in range(len(images)))
    gradients = torch.autograd.grad(score, weights)
    double_weights = [alpha.detach().double() for alpha in weights]
    double_gradients = [gradient.double() for gradient in gradients]
    return double_weights, double_gradients, logits.detach()


def window_place(y, x, grid, window, shift, pad_first):
    """Return (window, place in it) of one token, counting as a person would."""
    padded = [-(-side // window) * window for side in grid]
    rolled = padded if pad_first else grid
    y = (y - shift) % rolled[0]
    x = (x - shift) % rolled[1]
    windows_in_row = padded[1] // window
    number = (y // window) * windows_in_row + x // window
    place = (y % window) * window + x % window
    return number, place


def grid_place(y, x, grid, parts):
    """Return (group, place in it) of one token in MaxViT's grid attention."""
    step_y, step_x = [side // parts for side in grid]
    group = (y % step_y) * step_x + x % step_x
    place = (y // step_y) * parts + x // step_x
    return group, place


def dense_from_groups(weights: Tensor, grid, place) -> Tensor:
    """Scatter window weights of two images, token by token: (B * G, H, T, T) -> (B, N, N).

    Heads are averaged; ``place(y, x)`` returns the group of a token and its place there.
    """
    places = []
    for y in range(grid[0]):
        for x in range(grid[1]):
            places.append(place(y, x))
    places = torch.tensor(places)  # (N, 2)
    tokens = len(places)
    mean = weights.mean(1)
    batch = 2
    groups = len(mean) // batch
    dense = mean.new_zeros(batch, tokens, tokens)
    for image in range(batch):
        for token, (group, row) in enumerate(places.tolist()):
            is_in_group = places[:, 0] == group
            columns = places[is_in_group, 1]
            dense[image, token, is_in_group] = mean[image * groups + group, row, columns]
    return dense


def merge_matrix(coarse, fine) -> Tensor:
    """Return (coarse tokens, fine tokens): each parent shares its mass among 2 x 2 children."""
    matrix = torch.zeros(coarse[0] * coarse[1], fine[0] * fine[1], dtype=torch.double)
    for y in range(fine[0]):
        for x in range(fine[1]):
            matrix[(y // 2) * coarse[1] + x // 2, y * fine[1] + x] = 1
    return matrix / matrix.sum(1, keepdim=True)
