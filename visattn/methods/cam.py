"""Class activation maps on the features of any network; layer and grid are found automatically."""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from visattn.map import Map
from visattn.methods.chain import checked
from visattn.methods.target import Target, check_images, frozen_evaluation, run, scores_of
from visattn.names import suggest
from visattn.record.session import Maps, record_into

# features and their gradient, both (B, C, h, w), to a map (B, h, w)
CamFormula = Callable[[Tensor, Tensor], Tensor]


def gradcam(features: Tensor, gradient: Tensor) -> Tensor:
    r"""Return :math:`[\sum_c \operatorname{mean}(\partial y / \partial F_c)\, F_c]_+`.

    Reference: https://arxiv.org/abs/1610.02391.
    """
    weights = gradient.mean((2, 3), keepdim=True)  # (B, C, 1, 1)
    return (weights * features).sum(1).clamp(min=0)


def gradcam_plus_plus(features: Tensor, gradient: Tensor) -> Tensor:
    r"""Return Grad-CAM with :math:`w_c = \sum \alpha \odot [\partial y / \partial F_c]_+`.

    Reference: https://arxiv.org/abs/1710.11063, eq. 19.
    """
    square = gradient**2
    cube = gradient**3
    feature_sum = features.sum((2, 3), keepdim=True)  # (B, C, 1, 1)
    denominator = 2 * square + feature_sum * cube
    is_zero = denominator == 0
    ratio = square / torch.where(is_zero, 1, denominator)
    alpha = torch.where(is_zero, 0, ratio)
    positive_gradient = gradient.clamp(min=0)
    weights = (alpha * positive_gradient).sum((2, 3), keepdim=True)
    return (weights * features).sum(1).clamp(min=0)


def hirescam(features: Tensor, gradient: Tensor) -> Tensor:
    r"""Return :math:`\sum_c \partial y / \partial F_c \odot F_c`, signed.

    Reference: https://arxiv.org/abs/2011.08891.
    """
    return (gradient * features).sum(1)


def layercam(features: Tensor, gradient: Tensor) -> Tensor:
    r"""Return :math:`[\sum_c [\partial y / \partial F_c]_+ \odot F_c]_+`.

    Reference: Jiang et al. 2021, doi 10.1109/TIP.2021.3089943.
    """
    positive_gradient = gradient.clamp(min=0)
    return (positive_gradient * features).sum(1).clamp(min=0)


def eigencam(features: Tensor, gradient: Tensor) -> Tensor:
    r"""Return :math:`F v_1` with the first right singular vector of F (hw, C).

    The sign is such that the sum is positive. Reference: https://arxiv.org/abs/2008.00299.
    """
    flat = features.flatten(2).transpose(1, 2)  # (B, C, h, w) -> (B, hw, C)
    _, _, right = torch.linalg.svd(flat, full_matrices=False)
    direction = right[:, 0, :, None]  # (B, C, 1)
    projected = (flat @ direction)[..., 0]  # (B, hw)
    is_negative = projected.sum(1, keepdim=True) < 0
    sign = torch.where(is_negative, -1.0, 1.0)
    return (sign * projected).unflatten(1, features.shape[2:])


def cam(
    formula: CamFormula,
    name: str,
    model: nn.Module,
    images: Tensor,
    target: Target = None,
    layers=None,
) -> Map:
    """Explain by the features of one module and their gradient.

    ``layers`` names the module; None selects the last whose features have a gradient. That is the
    last feature map of a CNN, and of a transformer the tokens after the last block, or before it
    where only the class token is read: its patches have no gradient after that.
    """
    check_images(images)
    layer = _module_name(model, layers)
    with frozen_evaluation(model), torch.inference_mode(False), torch.enable_grad():
        images = images.detach().clone().requires_grad_()
        watch, output = _watch_features(model, images, layer)
        if watch.is_overwritten():
            # once more, with a copy of the values before they are written into
            watch, output = _watch_features(model, images, watch.candidates[0].name)
        scores, target = scores_of(output, target)
        chosen = watch.choose(scores.sum())
    grid = tuple(chosen.features.shape[2:])
    lattice = watch.spaces.lattice_of(grid)
    values = formula(chosen.features, chosen.gradient)
    heat = Map(values.float(), chosen.name, name, target, lattice=lattice)
    return checked(heat)


def _watch_features(
    model: nn.Module, images: Tensor, layer: str | None
) -> tuple["_FeatureWatch", object]:
    """Run the model; return the candidates for a map, and the model's output."""
    watch = _FeatureWatch(Maps(model, "graph"), layer)
    with record_into(watch.maps, model, on_exit=watch.on_exit):
        return watch, run(model, images)


class _Candidate(NamedTuple):
    """What a layer returned, and its node of the graph.

    The node stays where later operations write into the values; ``version`` tells that they did.
    """

    name: str
    values: Tensor
    node: GradientEdge
    version: int


class _Chosen(NamedTuple):
    """Features and their gradient, both (B, C, h, w), of the layer ``name``."""

    name: str
    features: Tensor
    gradient: Tensor


def _candidates_of(
    name: str,
    x: Tensor | None,
    copy: bool = False,
) -> list[_Candidate]:
    """Return the candidate as a list, which is empty where there is no gradient."""
    if not isinstance(x, Tensor) or not x.requires_grad:
        return []
    values = x.detach().clone() if copy else x
    return [_Candidate(name, values, get_gradient_edge(x), x._version)]


class _FeatureWatch:
    """The latest outputs of a running model that can become a map; earlier ones are released."""

    def __init__(self, maps: Maps, layer: str | None):
        self.maps = maps
        self.layer = layer
        self.candidates: list[_Candidate] = []

    @property
    def spaces(self):
        """What the running trace knows of grids."""
        return self.maps._watch

    def on_exit(self, frame, output):
        """Remember an output; return what replaces it, or None."""
        first = output[0] if isinstance(output, tuple) and output else output
        if not isinstance(first, Tensor) or not first.requires_grad:
            return None
        if self.layer is not None:
            return self._copy_named(first, output) if frame.name == self.layer else None
        if self._ends_token_block(frame.name):
            # the input as well: after a block that ends in the class token patches have no gradient
            before = _candidates_of(f"{frame.name} (input)", frame.input_tensor)
            self.candidates = before + _candidates_of(frame.name, first)
        elif self._is_feature_map(first):
            self.candidates = _candidates_of(frame.name, first)
        return None

    def _ends_token_block(self, name: str) -> bool:
        records = self.maps.records
        if not name or not records:
            return False
        return records[-1].kind == "token" and records[-1].block == name

    def _is_feature_map(self, x: Tensor) -> bool:
        if x.ndim != 4:
            return False
        grid = tuple(x.shape[2:])
        return grid in self.spaces.grids and math.prod(grid) > 1

    def _copy_named(self, first: Tensor, output):
        """Copy the values of the named layer; return what replaces a view.

        Writing into a view gives it another node of the graph, and the one it had is never passed.
        """
        assert self.layer is not None
        self.candidates = _candidates_of(self.layer, first, copy=True)
        if not first._is_view():
            return None
        if first is output:
            return first.clone()
        # a named tuple is made by _make, a plain one by its class
        make = getattr(type(output), "_make", tuple)
        return make((first.clone(), *output[1:]))

    def is_overwritten(self) -> bool:
        """Whether the only candidate was written into after its layer returned it."""
        if self.layer is not None or len(self.candidates) != 1:
            return False
        candidate = self.candidates[0]
        return candidate.values._version != candidate.version

    def choose(self, score: Tensor) -> _Chosen:
        """Return the last candidate whose patches have a gradient, else the first one."""
        if not self.candidates:
            where = f"at {self.layer!r}" if self.layer else "larger than one position"
            raise ValueError(f"no feature map {where} was seen on the way to the score")
        if not score.requires_grad:
            raise ValueError(
                "the score does not depend on the images in a way that can be differentiated"
            )
        nodes = [candidate.node for candidate in self.candidates]
        gradients = torch.autograd.grad(score, nodes, allow_unused=True)
        chosen = None
        pairs = list(zip(self.candidates, gradients, strict=True))
        for candidate, gradient in reversed(pairs):
            features = self._as_feature_map(candidate.values.detach())
            if features is None:
                continue
            gradient_map = self._gradient_map(gradient, features)
            chosen = _Chosen(candidate.name, features, gradient_map)
            if chosen.gradient.any():
                break
        if chosen is None:
            last = self.candidates[-1]
            raise ValueError(
                f"the output of {last.name!r} is no feature map: shape {tuple(last.values.shape)}"
            )
        return chosen

    def _gradient_map(
        self,
        gradient: Tensor | None,
        features: Tensor,
    ) -> Tensor:
        if gradient is None:
            return torch.zeros_like(features)
        feature_map = self._as_feature_map(gradient)
        if feature_map is None:
            return torch.zeros_like(features)
        return feature_map

    def _has_channels_last(self, x: Tensor) -> bool:
        """Whether a tensor of four axes is (B, h, w, C), as the grids of the model tell."""
        grids = [*self.spaces.grids]
        for record in self.maps.records:
            grids.append(record.grid)
        channels_last = tuple(x.shape[1:3])
        channels_first = tuple(x.shape[2:])
        return channels_last in grids and channels_first not in grids

    def _as_feature_map(self, x: Tensor) -> Tensor | None:
        """Bring (B, C, h, w), (B, h, w, C) or tokens (B, N, C) to (B, C, h, w)."""
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        if x.ndim == 4:
            if self._has_channels_last(x):
                return x.permute(0, 3, 1, 2)  # (B, h, w, C) -> (B, C, h, w)
            return x
        if x.ndim != 3:
            return None
        space = self.spaces.space_of(x.shape[1])
        if space is None or space.grid is None:
            return None
        if math.prod(space.grid) == 1:
            return None
        patches = x[:, space.prefix :].transpose(1, 2)  # (B, N, C) -> (B, C, h w)
        return patches.unflatten(2, space.grid)


def _module_name(model: nn.Module, layers) -> str | None:
    if layers is None:
        return None
    if isinstance(layers, (list, tuple)) and len(layers) == 1:
        layers = layers[0]
    names = [name for name, _ in model.named_modules() if name]
    if layers not in names:
        raise ValueError(
            f"layers must be the name of one module; got {layers!r}; {suggest(str(layers), names)}"
        )
    return layers


CAMS: dict[str, CamFormula] = {
    "gradcam": gradcam,
    "gradcam++": gradcam_plus_plus,
    "hirescam": hirescam,
    "layercam": layercam,
    "eigencam": eigencam,
}


def cam_method(name: str) -> Callable[..., Map]:
    """Return the method that METHODS holds."""
    return partial(cam, CAMS[name], name)
