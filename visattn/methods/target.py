"""Run a model for explanation: which score is explained, in which mode."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

Target = int | Tensor | Callable | None


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put every module in evaluation mode and every parameter out of the graph; restore both."""
    modes = [(module, module.training) for module in model.modules()]
    learns = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        model.eval()
        for parameter in learns:
            parameter.requires_grad_(False)
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        for parameter in learns:
            parameter.requires_grad_(True)


def check_images(images: Tensor):
    """Refuse what no model takes."""
    if not isinstance(images, Tensor) or images.ndim != 4 or not images.is_floating_point():
        what = (
            f"{tuple(images.shape)} {images.dtype}"
            if isinstance(images, Tensor)
            else type(images).__name__
        )
        raise ValueError(f"images must be a float tensor (B, C, H, W); got {what}")
    if not images.numel():
        raise ValueError(
            f"images must hold at least one image of at least one pixel; got shape {tuple(images.shape)}"
        )
    if not images.isfinite().all():
        raise ValueError("images must be finite; got NaN or infinity")


def run(model: nn.Module, images: Tensor):
    """Return the model's output, or say which images it refused."""
    try:
        return model(images)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().splitlines()
        raise ValueError(
            f"the model refused images of shape {tuple(images.shape)}: {reason[0] if reason else type(error).__name__}"
        ) from error


def scores_of(output, target: Target) -> tuple[Tensor, Tensor | None]:
    """Return the score of each image (B,) and the classes it stands for.

    Args:
        output: What the model returned: (B, classes), or something that holds it as ``logits`` or
            first.
        target: None for the class with the highest score, a class, a tensor of classes (B,), or a
            callable that makes scores of the output.
    """
    if callable(target):
        scores = target(output)
        return scores.reshape(-1), None
    logits = logits_of(output)
    if target is None:
        target = logits.argmax(1)
    target = torch.as_tensor(target, device=logits.device)
    if target.is_floating_point() or target.dtype == torch.bool:
        raise ValueError(f"target must hold class numbers; got {target.dtype}")
    batch, classes = logits.shape
    if target.ndim > 1 or (target.ndim == 1 and len(target) != batch):
        raise ValueError(
            f"target must be a class or one class per image, ({batch},); got shape {tuple(target.shape)}"
        )
    target = target.long().expand(batch)
    if target.min() < 0 or target.max() >= classes:
        raise ValueError(f"target must lie in 0 to {classes - 1}; got {target.unique().tolist()}")
    return logits.gather(1, target[:, None])[:, 0], target


def logits_of(output) -> Tensor:
    """Find (B, classes) in what a model returned."""
    found = output
    if not isinstance(found, Tensor):
        found = getattr(output, "logits", None)
        if found is None and isinstance(output, (tuple, list)) and output:
            found = output[0]
        if found is None and isinstance(output, dict):
            found = output.get("logits", output.get("out"))
    if not isinstance(found, Tensor) or found.ndim != 2:
        what = tuple(found.shape) if isinstance(found, Tensor) else type(output).__name__
        raise ValueError(
            f"the model must return scores (B, classes) to take a class as target; got {what}: "
            "pass a callable as target that makes one score per image of the output"
        )
    return found
