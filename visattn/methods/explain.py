"""The methods by name, and explain()."""

import difflib
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from visattn.map import Map
from visattn.methods.cam import CAMS, cam_method
from visattn.methods.chain import EmptyMap
from visattn.methods.gradient import gae, grad_attention, grad_rollout
from visattn.methods.integrated import integrated_gradients
from visattn.methods.legrad import legrad
from visattn.methods.raw import dino, raw
from visattn.methods.rollout import rollout
from visattn.methods.target import Target, check_images, evaluating, run
from visattn.record.session import capture


class Method(NamedTuple):
    """One way to explain: ``run(model, images, target, layers)`` gives a Map."""

    run: Callable[..., Map]
    class_specific: bool
    looks_at: str


def explain(
    model: nn.Module, images: Tensor, target: Target = None, method: str = "gae", layers=None
) -> Map:
    """Say where a model looked, and for class-specific methods what spoke for a class.

    The model runs in evaluation mode and is given back as it was: modes, gradients and hooks.

    Args:
        model: Any network.
        images: (B, C, H, W), as the model takes them.
        target: For class-specific methods: None for the predicted class, a class, a tensor of
            classes (B,), or a callable that makes one score per image of the model's output.
        method: A name in METHODS.
        layers: None lets the method choose. Attention methods take numbers, names, a slice or a
            list; CAM methods the name of a module.

    Returns:
        Map (B, h, w).

    Raises:
        ValueError: The method, a layer or a class does not exist; nothing could be seen; the map is
            not finite or zero.

    Example:
        >>> from visattn.models.presets import create_model
        >>> model = create_model("vit_nano", num_classes=5, image_size=(24, 32))
        >>> explain(model, torch.rand(2, 3, 24, 32), method="rollout").values.ndim
        3
    """
    if method not in METHODS:
        near = difflib.get_close_matches(str(method), METHODS, 1)
        raise ValueError(
            f"method must be one of {', '.join(METHODS)}; got {method!r}"
            + (f": {near[0]}?" if near else "")
        )
    # A compiled model is explained through the module it was made of.
    return METHODS[method].run(getattr(model, "_orig_mod", model), images, target, layers)


def explain_or_zeros(
    model: nn.Module, images: Tensor, target: Target = None, method: str = "gae", layers=None
) -> Map:
    """Explain, but return a map of zeros where `explain` refuses one: to a measure it is a finding like any other."""
    try:
        return explain(model, images, target, method, layers)
    except EmptyMap as empty:
        return empty.heat


def _from_capture(method: Callable[..., Map]) -> Callable[..., Map]:
    """Make a method of captured maps one of a model and images."""

    def explained(model: nn.Module, images: Tensor, target: Target = None, layers=None) -> Map:
        check_images(images)
        with evaluating(model), torch.no_grad():
            with capture(model) as maps:
                run(model, images)
            return method(maps, **({} if layers is None else {"layers": layers}))

    return explained


METHODS = {
    "raw": Method(_from_capture(raw), False, "attention"),
    "rollout": Method(_from_capture(rollout), False, "attention"),
    "grad_attention": Method(grad_attention, True, "attention"),
    "grad_rollout": Method(grad_rollout, True, "attention"),
    "gae": Method(gae, True, "attention"),
    "legrad": Method(legrad, True, "attention"),
    "dino": Method(_from_capture(dino), False, "attention"),
    **{name: Method(cam_method(name), name != "eigencam", "features") for name in CAMS},
    "integrated_gradients": Method(integrated_gradients, True, "pixels"),
}
"""How to explain, by the name that commands use."""
