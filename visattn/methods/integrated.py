"""Integrated gradients, through captum where it is installed."""

import torch
from torch import Tensor, nn

from visattn.map import Map
from visattn.methods.chain import checked
from visattn.methods.target import (
    Target,
    check_images,
    frozen_evaluation,
    logits_of,
    run,
    scores_of,
)


def integrated_gradients(
    model: nn.Module,
    images: Tensor,
    target: Target = None,
    layers=None,
    *,
    steps: int = 32,
) -> Map:
    r"""Integrate the gradient at the pixels along the line from a zero image.

    The map is signed and summed over channels.

    .. math::
        \text{map} = \sum_c x_c \odot \int_0^1 \frac{\partial y}{\partial x_c}(a x)\, da

    The map has the size of the image, and sums to y(x) - y(0) but for the error of the quadrature.

    Args:
        model: Any network.
        images: (B, C, H, W), as the model takes them.
        target: As in `visattn.explain`.
        layers: None: the method reads pixels.
        steps: Points of the quadrature.

    Raises:
        ImportError: captum is not installed.
        ValueError: ``layers`` is not None.

    Reference:
        Sundararajan, Taly, Yan 2017, https://arxiv.org/abs/1703.01365. Differs from: nothing.
    """
    try:
        from captum.attr import IntegratedGradients
    except ImportError as error:
        raise ImportError(
            "integrated_gradients needs captum: pip install 'visattn[captum]'"
        ) from error
    if layers is not None:
        raise ValueError(f"integrated_gradients reads pixels and takes no layers; got {layers!r}")
    check_images(images)
    with frozen_evaluation(model), torch.inference_mode(False), torch.enable_grad():
        images = images.detach().clone()
        with torch.no_grad():
            _, classes = scores_of(run(model, images), target)

        def score(x: Tensor) -> Tensor:
            output = model(x)
            if classes is not None:
                # captum picks the classes
                return logits_of(output)
            scores, _ = scores_of(output, target)
            return scores

        values = IntegratedGradients(score).attribute(
            images,
            target=classes,
            n_steps=steps,
            internal_batch_size=max(len(images), 8),
        )
    values = values.detach().sum(1).float()  # (B, C, H, W) -> (B, H, W)
    return checked(Map(values, "pixels", "integrated_gradients", classes))
