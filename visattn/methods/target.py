"""Run a model for explanation: which score is explained, in which mode."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from visattn.tracing import evaluating

Target = int | Tensor | Callable | None


@contextmanager
def frozen_evaluation(model: nn.Module) -> Iterator[None]:
    """Put every module in evaluation mode and every parameter out of the graph; restore both."""
    # frozen parameters stay frozen afterwards
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with evaluating(model):
        try:
            for parameter in trainable:
                parameter.requires_grad_(False)
            yield
        finally:
            for parameter in trainable:
                parameter.requires_grad_(True)


def check_images(images: object) -> None:
    """Refuse what no model takes."""
    if not isinstance(images, Tensor):
        raise ValueError(f"images must be a float tensor (B, C, H, W); got {type(images).__name__}")
    shape = tuple(images.shape)
    if images.ndim != 4 or not images.is_floating_point():
        raise ValueError(f"images must be a float tensor (B, C, H, W); got {shape} {images.dtype}")
    if not images.numel():
        raise ValueError(
            f"images must hold at least one image of at least one pixel; got shape {shape}"
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
        lines = str(error).strip().splitlines()
        reason = lines[0] if lines else type(error).__name__
        raise ValueError(
            f"the model refused images of shape {tuple(images.shape)}: {reason}"
        ) from error


def scores_of(output: object, target: Target) -> tuple[Tensor, Tensor | None]:
    """Return the score of each image (B,) and the classes it stands for.

    Args:
        output: What the model returned: (B, classes), or an object that holds it as ``logits`` or
            first.
        target: None for the class with the highest score, a class, a tensor of classes (B,), or a
            callable that makes scores of the output.
    """
    if callable(target):
        return target(output).reshape(-1), None
    logits = logits_of(output)
    if target is None:
        target = logits.argmax(1)
    batch, class_count = logits.shape
    classes = _classes_of(target, batch, class_count).to(logits.device)
    scores = logits.gather(1, classes[:, None])[:, 0]  # (B, classes) -> (B,)
    return scores, classes


def _classes_of(
    target: int | Tensor,
    batch: int,
    class_count: int,
) -> Tensor:
    """Return one class per image, (B,) int64."""
    classes = torch.as_tensor(target)
    if classes.is_floating_point() or classes.dtype == torch.bool:
        raise ValueError(f"target must hold class numbers; got {classes.dtype}")
    if classes.shape not in ((), (batch,)):
        raise ValueError(
            f"target must be a class or one class per image, ({batch},); "
            f"got shape {tuple(classes.shape)}"
        )
    classes = classes.long().expand(batch)
    if classes.min() < 0 or classes.max() >= class_count:
        raise ValueError(
            f"target must lie in 0 to {class_count - 1}; got {classes.unique().tolist()}"
        )
    return classes


def logits_of(output: object) -> Tensor:
    """Return the (B, classes) that a model's output is or holds."""
    logits = _logits_in(output)
    if isinstance(logits, Tensor) and logits.ndim == 2:
        return logits
    received: object = type(output).__name__
    if isinstance(logits, Tensor):
        received = tuple(logits.shape)
    raise ValueError(
        f"the model must return scores (B, classes) to take a class as target; got {received}: "
        "pass a callable as target that makes one score per image of the output"
    )


def _logits_in(output: object) -> object:
    if isinstance(output, Tensor):
        return output
    logits = getattr(output, "logits", None)
    if logits is not None:
        return logits
    if isinstance(output, (tuple, list)) and output:
        return output[0]
    if isinstance(output, dict):
        return output.get("logits", output.get("out"))
    return None
