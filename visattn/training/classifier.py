"""load(): from a run's folder to something that takes a photograph and answers."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn

from visattn.data.transform import build_transform
from visattn.training.checkpoint import KEY, build_network, find_checkpoint, read_checkpoint


class Classifier:
    """Say which class an image belongs to.

    Args:
        model: The network, from images (B, 3, h, w) to class scores (B, C); put into evaluation mode.
        transform: What turns a PIL image into the tensor (3, h, w) the network was trained on.
        classes: The C names.

    Shape:
        - Input: one PIL image of any size and mode, or a list or tuple of B.
        - Output: probabilities (C,), or (B, C), float32 on the CPU; they sum to one.

    Raises:
        TypeError: an image is no PIL image, or there is none.

    Example:
        >>> network = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 2))
        >>> transform = build_transform({"image_size": [8, 8], "resize": "cover", "mean": [0.5] * 3, "std": [0.25] * 3})
        >>> Classifier(network, transform, ["cat", "dog"])(Image.new("L", (20, 10))).shape
        torch.Size([2])
    """

    def __init__(self, model: nn.Module, transform: Callable[[Image.Image], Tensor], classes: Sequence[str]):
        self.model = model.eval()
        self.transform = transform
        self.classes = list(classes)

    @torch.inference_mode()
    def __call__(self, images: Image.Image | list[Image.Image] | tuple[Image.Image, ...]) -> Tensor:
        several = isinstance(images, list | tuple)
        given = images if several else [images]
        strange = [type(image).__name__ for image in given if not isinstance(image, Image.Image)]
        if strange or not given:
            raise TypeError(f"images must be a PIL image or a list of them, got {strange[0] if strange else 'none'}")
        batch = torch.stack([self.transform(image) for image in given])
        first = next(self.model.parameters(), batch)
        probabilities = self.model(batch.to(first.device, first.dtype)).float().softmax(1).cpu()
        return probabilities if several else probabilities[0]


def load(run: str | Path) -> Classifier:
    """Return the classifier of a run's folder (its best checkpoint) or of one checkpoint file, on the CPU."""
    run = Path(run)
    content = read_checkpoint(find_checkpoint(run) if run.is_dir() else run)
    note = content[KEY]
    model = build_network(**note["network"])
    weights = {key[6:]: value for key, value in content["state_dict"].items() if key.startswith("model.")}
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(f"the weights in {run} do not fit the model {note['network']['name']!r}: {error}") from error
    return Classifier(model, build_transform(note["transform"]), note["classes"])
