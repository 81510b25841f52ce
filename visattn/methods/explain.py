"""The methods by name, and explain()."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from visattn.map import Map
from visattn.methods.cam import cam_method
from visattn.methods.chain import EmptyMap
from visattn.methods.gradient import gae, grad_attention, grad_rollout
from visattn.methods.integrated import integrated_gradients
from visattn.methods.legrad import legrad
from visattn.methods.raw import dino, raw
from visattn.methods.rollout import rollout
from visattn.methods.target import Target, check_images, frozen_evaluation, run
from visattn.names import NamedTable, lookup, suggest
from visattn.record.session import capture

# arguments that `explain` passes by itself; all others of a method are its options
ARGUMENTS = ("maps", "model", "images", "target", "layers")


@dataclass(frozen=True)
class Method:
    """One method of explanation.

    Args:
        function: ``function(model, images, target, layers, **options)`` returns a `Map`.
        class_specific: Whether the map depends on the target.
        source: What the map is computed from: "attention", "features" or "pixels".
        from_maps: The function takes ``(maps, layers, **options)`` with what `capture` recorded.
    """

    function: Callable[..., Map]
    class_specific: bool
    source: str = "attention"
    from_maps: bool = False

    @property
    def options(self) -> list[str]:
        """Names of the options that `explain` accepts for this method."""
        parameters = inspect.signature(self.function).parameters
        return [name for name in parameters if name not in ARGUMENTS]

    def run(
        self,
        model: nn.Module,
        images: Tensor,
        target: Target,
        layers,
        options: dict,
    ) -> Map:
        """Return the map of images; ``layers`` None is the method's own choice."""
        if not self.from_maps:
            return self.function(model, images, target, layers, **options)
        check_images(images)
        if layers is not None:
            options = {"layers": layers, **options}
        with frozen_evaluation(model), torch.no_grad():
            with capture(model) as maps:
                run(model, images)
            return self.function(maps, **options)


def explain(
    model: nn.Module,
    images: Tensor,
    target: Target = None,
    method: str = "gae",
    layers=None,
    **options,
) -> Map:
    """Compute a heat map of what a prediction depends on.

    Attention methods show what the model attends; class-specific methods show the evidence for a
    class. The model runs in evaluation mode; its modes, gradients and hooks are restored.

    Args:
        model: Any network.
        images: (B, C, H, W), as the model takes them.
        target: For class-specific methods: None for the predicted class, a class, a tensor of
            classes (B,), or a callable that makes one score per image of the model's output.
        method: A name in METHODS.
        layers: None lets the method choose. Attention methods take numbers, names, a slice or a
            list; CAM methods the name of a module.
        options: Options of the method, such as ``head_fusion="max"`` for rollout or ``mass=0.8``
            for dino; ``METHODS[name].options`` lists them.

    Returns:
        Map (B, h, w).

    Raises:
        ValueError: The method, a layer or a class does not exist; no attention was recorded; the
            map is not finite or zero.
        TypeError: The method has no such option.

    Example:
        >>> from visattn.models.presets import create_model
        >>> model = create_model("vit_nano", num_classes=5, image_size=(24, 32))
        >>> images = torch.rand(2, 3, 24, 32)
        >>> explain(model, images, method="rollout", head_fusion="max").values.ndim
        3
    """
    chosen = lookup(METHODS, method, "method")
    for name in options:
        if name not in chosen.options:
            raise TypeError(f"{method} has no option {name!r}; {suggest(name, chosen.options)}")
    # a compiled model is explained through the module it was made of
    model = getattr(model, "_orig_mod", model)
    return chosen.run(model, images, target, layers, options)


def explain_or_zeros(
    model: nn.Module,
    images: Tensor,
    target: Target = None,
    method: str = "gae",
    layers=None,
    **options,
) -> Map:
    """Explain, but return a map of zeros where `explain` refuses one: measures count it as well."""
    try:
        return explain(model, images, target, method, layers, **options)
    except EmptyMap as empty:
        return empty.heat


METHODS = NamedTable(
    {
        "raw": Method(raw, class_specific=False, from_maps=True),
        "rollout": Method(rollout, class_specific=False, from_maps=True),
        "grad_attention": Method(grad_attention, class_specific=True),
        "grad_rollout": Method(grad_rollout, class_specific=True),
        "gae": Method(gae, class_specific=True),
        "legrad": Method(legrad, class_specific=True),
        "dino": Method(dino, class_specific=False, from_maps=True),
        "gradcam": Method(cam_method("gradcam"), class_specific=True, source="features"),
        "gradcam++": Method(cam_method("gradcam++"), class_specific=True, source="features"),
        "hirescam": Method(cam_method("hirescam"), class_specific=True, source="features"),
        "layercam": Method(cam_method("layercam"), class_specific=True, source="features"),
        "eigencam": Method(cam_method("eigencam"), class_specific=False, source="features"),
        "integrated_gradients": Method(integrated_gradients, class_specific=True, source="pixels"),
    },
    {
        "computed from": lambda method: method.source,
        "class-specific": lambda method: "yes" if method.class_specific else "no",
        "options": lambda method: ", ".join(method.options) or "-",
    },
)
"""How to explain, by the name that commands use."""
