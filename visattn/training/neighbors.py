"""How good features are without any training: each image is classed as its nearest neighbors are."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visattn.models.weights import last_layer

TEMPERATURE = 0.07  # of the votes, as in DINO


@torch.no_grad()
def features(model: nn.Module, loader, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return what enters the last layer, scaled to length one, and the labels: (N, D) and (N,)."""
    kept, labels = [], []

    def keep(module: nn.Module, inputs: tuple) -> None:
        kept.append(F.normalize(inputs[0].flatten(1).float(), dim=1).cpu())

    hook = last_layer(model)[1].register_forward_pre_hook(keep)
    try:
        for images, numbers in loader:
            model(images.to(device))
            labels.append(numbers)
    finally:
        hook.remove()
    return torch.cat(kept), torch.cat(labels)


def vote(train: tuple[Tensor, Tensor], test: Tensor, k: int, classes: int) -> Tensor:
    r"""Return the votes for each class, (N, C): of the k nearest neighbors by cosine, each of :math:`e^{\cos / 0.07}`.

    Reference:
        Wu et al. 2018, "Unsupervised Feature Learning via Non-Parametric Instance Discrimination",
        section 3.4, https://arxiv.org/abs/1805.01978. Differs from the paper in: nothing but k,
        which is asked for.

    Example:
        >>> train = torch.eye(3), torch.tensor([0, 1, 1])
        >>> vote(train, torch.tensor([[0.0, 0.6, 0.8]]), 2, 2).argmax(1)
        tensor([1])
    """
    found, known = train
    votes = []
    for part in test.split(
        1024
    ):  # tiles, or a million images would need their whole table of distances
        near, index = (part @ found.T).topk(min(k, len(found)), dim=1)
        weights = (near / TEMPERATURE).exp()
        votes.append(torch.zeros(len(part), classes).scatter_add_(1, known[index], weights))
    return torch.cat(votes)


def neighbors_accuracy(model: nn.Module, data, k: int, device: torch.device) -> float:
    """Return the accuracy of k nearest neighbors from the training images to those of validation."""
    if data.multilabel:
        raise ValueError(
            "knn gives an image the class of its neighbors: it needs one label per image, not several"
        )
    model = model.to(device).eval()
    train = features(model, data.ordered_dataloader("train"), device)
    test, labels = features(model, data.ordered_dataloader("val"), device)
    return float((vote(train, test, k, data.num_classes).argmax(1) == labels).float().mean())
