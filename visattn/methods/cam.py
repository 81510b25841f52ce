"""Class activation maps, on the features of any network: the layer and the grid are found by themselves."""

import difflib
import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from visattn.map import Map
from visattn.methods.chain import checked
from visattn.methods.target import Target, check_images, evaluating, run, scores_of
from visattn.record.session import Maps, record_into

Weigh = Callable[[Tensor, Tensor], Tensor]


def gradcam(features: Tensor, gradient: Tensor) -> Tensor:
    r""":math:`[\sum_c \operatorname{mean}(\partial y / \partial F_c)\, F_c]_+`; https://arxiv.org/abs/1610.02391."""
    return (gradient.mean((2, 3), keepdim=True) * features).sum(1).clamp(min=0)


def gradcam_plus_plus(features: Tensor, gradient: Tensor) -> Tensor:
    r""":math:`w_c = \sum \alpha \odot [\partial y / \partial F_c]_+`; https://arxiv.org/abs/1710.11063, eq. 19."""
    square, cube = gradient**2, gradient**3
    below = 2 * square + features.sum((2, 3), keepdim=True) * cube
    alpha = torch.where(below == 0, 0, square / torch.where(below == 0, 1, below))
    weights = (alpha * gradient.clamp(min=0)).sum((2, 3), keepdim=True)
    return (weights * features).sum(1).clamp(min=0)


def hirescam(features: Tensor, gradient: Tensor) -> Tensor:
    r""":math:`\sum_c \partial y / \partial F_c \odot F_c`, signed; https://arxiv.org/abs/2011.08891."""
    return (gradient * features).sum(1)


def layercam(features: Tensor, gradient: Tensor) -> Tensor:
    r""":math:`[\sum_c [\partial y / \partial F_c]_+ \odot F_c]_+`; Jiang et al. 2021, doi 10.1109/TIP.2021.3089943."""
    return (gradient.clamp(min=0) * features).sum(1).clamp(min=0)


def eigencam(features: Tensor, gradient: Tensor) -> Tensor:
    r""":math:`F v_1` with the first right singular vector of F (hw, C), its sign such that the sum is positive;
    https://arxiv.org/abs/2008.00299."""
    flat = features.flatten(2).transpose(1, 2)
    _, _, right = torch.linalg.svd(flat, full_matrices=False)
    projected = (flat @ right[:, 0, :, None])[..., 0]
    sign = torch.where(projected.sum(1, keepdim=True) < 0, -1.0, 1.0)
    return (sign * projected).unflatten(1, features.shape[2:])


def cam(
    weigh: Weigh, name: str, model: nn.Module, images: Tensor, target: Target = None, layers=None
) -> Map:
    """Explain by features and their gradient; ``layers`` names one module, None takes the last that speaks for it.

    That is the last feature map of a CNN, and of a transformer the tokens of the last block's end,
    or of its beginning
    where only the class token goes on: its patches have no gradient after that.
    """
    check_images(images)
    wanted = _module_name(model, layers)
    with evaluating(model), torch.inference_mode(False), torch.enable_grad():
        images = images.detach().clone().requires_grad_()
        found, output = _watched(model, images, wanted)
        if found.rewritten():
            found, output = _watched(model, images, found.latest[0].name)
        scores, target = scores_of(output, target)
        where, features, gradient = found.choose(scores.sum())
    lattice = found.maps._watch.lattice_of(tuple(features.shape[2:]))
    return checked(Map(weigh(features, gradient).float(), where, name, target, lattice=lattice))


def _watched(model: nn.Module, images: Tensor, wanted: str | None) -> tuple["_Features", object]:
    found = _Features(Maps(model, "graph"), wanted)
    with record_into(found.maps, model, on_exit=found.see):
        return found, run(model, images)


class _Seen(NamedTuple):
    """What a layer returned, and its place in the graph, which stays where later operations write into the values."""

    name: str
    values: Tensor
    place: GradientEdge
    version: int

    @staticmethod
    def of(name: str, x: Tensor | None, copied: bool = False) -> list["_Seen"]:
        """Return none for what has no gradient."""
        if not isinstance(x, Tensor) or not x.requires_grad:
            return []
        return [_Seen(name, x.detach().clone() if copied else x, get_gradient_edge(x), x._version)]


class _Features:
    """The latest outputs of a running model that can be a picture; earlier ones are let go."""

    def __init__(self, maps: Maps, wanted: str | None):
        self.maps, self.wanted = maps, wanted
        self.latest: list[_Seen] = []

    def see(self, frame, output):
        first = output[0] if isinstance(output, tuple) and output else output
        if not isinstance(first, Tensor) or not first.requires_grad:
            return None
        if self.wanted is not None:
            return self._keep(first, output) if frame.name == self.wanted else None
        records = self.maps.records
        if (
            records
            and records[-1].kind == "token"
            and frame.name
            and frame.name == records[-1].block
        ):
            self.latest = _Seen.of(f"{frame.name} (input)", frame.tensor()) + _Seen.of(
                frame.name, first
            )
        elif (
            first.ndim == 4
            and tuple(first.shape[2:]) in self.maps._watch.grids
            and math.prod(first.shape[2:]) > 1
        ):
            self.latest = _Seen.of(frame.name, first)
        return None

    def _keep(self, first: Tensor, output):
        """Keep the values of the named layer; return what goes on in place of a view.

        Writing into a view gives it another place in the graph, and the one it had is never passed.
        """
        self.latest = _Seen.of(self.wanted, first, copied=True)
        if not first._is_view():
            return None
        return (
            first.clone()
            if first is output
            else getattr(type(output), "_make", tuple)((first.clone(), *output[1:]))
        )

    def rewritten(self) -> bool:
        """Whether the one feature map that was found was written into after its layer returned it."""
        only = self.latest[0] if self.wanted is None and len(self.latest) == 1 else None
        return only is not None and only.values._version != only.version

    def choose(self, score: Tensor) -> tuple[str, Tensor, Tensor]:
        """Return name, features and gradient (B, C, h, w) of the last candidate whose patches have a gradient."""
        if not self.latest:
            where = f"at {self.wanted!r}" if self.wanted else "larger than one position"
            raise ValueError(f"no feature map {where} was seen on the way to the score")
        if not score.requires_grad:
            raise ValueError(
                "the score does not depend on the images in a way that can be differentiated"
            )
        gradients = torch.autograd.grad(
            score, [seen.place for seen in self.latest], allow_unused=True
        )
        found = None
        for seen, gradient in reversed(list(zip(self.latest, gradients, strict=True))):
            features = self._picture(seen.values.detach())
            if features is None:
                continue
            found = (
                seen.name,
                features,
                torch.zeros_like(features) if gradient is None else self._picture(gradient),
            )
            if found[2].any():
                break
        if found is None:
            last = self.latest[-1]
            raise ValueError(
                f"the output of {last.name!r} is no picture: shape {tuple(last.values.shape)}"
            )
        return found

    def _picture(self, x: Tensor) -> Tensor | None:
        """Bring (B, C, h, w), (B, h, w, C) or tokens (B, N, C) to (B, C, h, w)."""
        watch = self.maps._watch
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        grids = [*watch.grids, *(record.grid for record in self.maps.records)]
        if x.ndim == 4:
            return (
                x.permute(0, 3, 1, 2)
                if tuple(x.shape[1:3]) in grids and tuple(x.shape[2:]) not in grids
                else x
            )
        space = watch.space_of(x.shape[1]) if x.ndim == 3 else None
        if space is None or space.grid is None or math.prod(space.grid) == 1:
            return None
        return x[:, space.prefix :].transpose(1, 2).unflatten(2, space.grid)


def _module_name(model: nn.Module, layers) -> str | None:
    if layers is None:
        return None
    if isinstance(layers, (list, tuple)) and len(layers) == 1:
        layers = layers[0]
    names = [name for name, _ in model.named_modules() if name]
    if layers not in names:
        near = difflib.get_close_matches(str(layers), names, 3)
        raise ValueError(
            f"layers must be the name of one module, such as {', '.join(near or names[:5])}; got {layers!r}"
        )
    return layers


CAMS = {
    "gradcam": gradcam,
    "gradcam++": gradcam_plus_plus,
    "hirescam": hirescam,
    "layercam": layercam,
    "eigencam": eigencam,
}


def cam_method(name: str) -> Callable[..., Map]:
    """Return a method as METHODS holds it."""
    return partial(cam, CAMS[name], name)
