"""How good features are without any training: the accuracy of k nearest neighbors."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from visattn.data.module import ImageData
from visattn.models.weights import last_layer

TEMPERATURE = 0.07  # of the votes, as in DINO
TILE = 1024  # images whose similarities to all training images are in memory at once


@torch.no_grad()
def features(
    model: nn.Module,
    loader: DataLoader,
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """Return the inputs of the last layer (N, D), scaled to length one, and the labels (N,)."""
    batch_features: list[Tensor] = []
    batch_labels: list[Tensor] = []

    def save_input(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        vectors = inputs[0].flatten(1).float()  # (B, D)
        batch_features.append(F.normalize(vectors, dim=1).cpu())

    _, layer = last_layer(model)
    hook = layer.register_forward_pre_hook(save_input)
    try:
        for images, labels in loader:
            model(images.to(device))
            batch_labels.append(labels)
    finally:
        hook.remove()
    return torch.cat(batch_features), torch.cat(batch_labels)


def vote(
    train: tuple[Tensor, Tensor],
    test: Tensor,
    k: int,
    classes: int,
) -> Tensor:
    r"""Return the votes for each class, (N, C).

    Each of the k nearest neighbors by cosine votes for its class with :math:`e^{\cos / 0.07}`.

    Reference:
        Wu et al. 2018, "Unsupervised Feature Learning via Non-Parametric Instance Discrimination",
        section 3.4, https://arxiv.org/abs/1805.01978. Differs from the paper in: nothing but k,
        which is an argument.

    Example:
        >>> train = torch.eye(3), torch.tensor([0, 1, 1])
        >>> vote(train, torch.tensor([[0.0, 0.6, 0.8]]), 2, 2).argmax(1)
        tensor([1])
    """
    train_features, train_labels = train
    neighbors = min(k, len(train_features))
    votes = []
    # tiles, or a million images would need their whole table of similarities
    for tile in test.split(TILE):
        similarities = tile @ train_features.T  # (tile, N)
        cosines, index = similarities.topk(neighbors, dim=1)  # (tile, k)
        weights = (cosines / TEMPERATURE).exp()
        tile_votes = torch.zeros(len(tile), classes)
        votes.append(tile_votes.scatter_add_(1, train_labels[index], weights))
    return torch.cat(votes)


def neighbors_accuracy(
    model: nn.Module,
    data: ImageData,
    k: int,
    device: torch.device,
) -> float:
    """Classify validation images by their k nearest training images; return the accuracy."""
    if data.multilabel:
        raise ValueError(
            "knn gives an image the class of its neighbors: "
            "it needs one label per image, not several"
        )
    model = model.to(device).eval()
    train = features(model, data.ordered_dataloader("train"), device)
    test_features, labels = features(model, data.ordered_dataloader("val"), device)
    answers = vote(train, test_features, k, data.num_classes).argmax(1)
    return float((answers == labels).float().mean())
