"""Run a model for observation: in evaluation mode, and back in its own modes afterwards."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put every module of a model in evaluation mode, then restore the mode of each.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Dropout(), torch.nn.BatchNorm2d(3).eval())
        >>> with evaluating(model):
        ...     print([module.training for module in model])
        [False, False]
        >>> [module.training for module in model]
        [True, False]
    """
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        # Not train(): a model may hold frozen layers, whose mode differs from their parent's.
        for module, mode in modes:
            module.training = mode
