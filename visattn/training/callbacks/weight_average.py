"""AverageWeights: validate and keep a running average of the weights."""

import torch
from lightning.pytorch.callbacks import WeightAveraging
from torch import Tensor


def warmed_decay(decay: float, count: int) -> float:
    """Return the decay after ``count`` steps: small at first, to forget the first weights."""
    return min(decay, (1 + count) / (10 + count))


class AverageWeights(WeightAveraging):
    r"""Keep a running average of the weights; validate, save and end with it.

    .. math::
        \bar{w}_t = d_t \bar{w}_{t-1} + (1 - d_t) w_t, \qquad
        d_t = \min\left(d, \tfrac{1 + t}{10 + t}\right)

    A checkpoint holds the average as its weights, and the trained weights beside it, so that
    training resumes from them. Among the callbacks it belongs behind those that look at the
    validated network, and before those that save.

    Args:
        decay: d, in (0, 1); about 1 / (1 - d) steps are averaged.

    Reference:
        The warm-up is that of TensorFlow's ExponentialMovingAverage with ``num_updates``.
        Differs from Lightning's EMAWeightAveraging in: the warm-up; whole numbers are copied; the
        average stays in place until validation has ended, so that pictures show it too.

    Example:
        >>> [round(warmed_decay(0.99, count), 2) for count in (0, 10, 100, 10**6)]
        [0.1, 0.55, 0.92, 0.99]
    """

    def __init__(self, decay: float):
        def update(
            averages: list[Tensor],
            weights: list[Tensor],
            count: Tensor,
        ) -> None:
            if averages[0].is_floating_point():
                weight = 1 - warmed_decay(decay, int(count))
                torch._foreach_lerp_(averages, weights, weight)
            else:
                torch._foreach_copy_(averages, weights)

        super().__init__(multi_avg_fn=update)

    def on_fit_start(self, trainer, pl_module) -> None:
        assert self._average_model is not None  # Lightning makes it in setup
        self._average_model.to(pl_module.device)

    def on_validation_epoch_start(self, trainer, pl_module) -> None:
        """Do nothing: the weights are exchanged around the whole validation."""

    def on_validation_epoch_end(self, trainer, pl_module) -> None:
        """Do nothing, as above."""

    def on_validation_start(self, trainer, pl_module) -> None:
        super().on_validation_epoch_start(trainer, pl_module)

    def on_validation_end(self, trainer, pl_module) -> None:
        super().on_validation_epoch_end(trainer, pl_module)
