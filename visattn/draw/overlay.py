"""Overlay: the map of an image drawn over it."""

import numpy as np
import torch
import torch.nn.functional as F

from visattn.draw.picture import like, to_rgb
from visattn.draw.scale import Scale, color_bar, one_map, scale_of
from visattn.map import Lattice, resized
from visattn.names import lookup


def overlay(
    image,
    heat,
    *,
    colormap: str = "inferno",
    alpha: float = 0.5,
    vmin: float | None = None,
    vmax: float | None = None,
    scale_bar: bool = False,
    blend: str = "alpha",
):
    r"""Draw the map of an image over it.

    .. math::
        y = (1 - a)\, x + a\, \mathrm{color}(s), \qquad
        s = \frac{\mathrm{heat} - v_{\min}}{v_{\max} - v_{\min}} \text{ cut to } [0, 1]

    with a = ``alpha``. ``blend="mask"`` darkens instead what the map leaves out, y = (1 - a (1 -
    s)) x; ``blend="contour"`` draws the lines s = 1/4, 1/2 and 3/4 in their colors, edged white,
    and leaves the rest alone.

    Args:
        image: PIL image, array (H, W), (H, W, 1|3|4) or tensor (1|3|4, H, W); uint8, or floats in
            [0, 1].
        heat: The `Map` of this image, or its values (h, w); resized bilinearly between the centers
            of its patches.
        colormap: Name of a matplotlib colormap; the perceptual ones (inferno, viridis, cividis) do
            not invent edges.
        alpha: Opacity of the map, in [0, 1].
        vmin, vmax: Values of the first and the last color; None takes the smallest and largest
            value of all the maps ``heat`` was picked from, so that ``heats[0]`` and ``heats[1]``
            compare; of ``heat`` if it is alone.
        scale_bar: Add at the right side the colors with their values; the picture grows wider by
            it.
        blend: "alpha", "contour" or "mask".

    Returns:
        An RGB picture of the kind (and, without the bar, of the size) of ``image``.

    Raises:
        ValueError: a colormap or blend that does not exist, alpha outside [0, 1], vmin not below
            vmax, maps of several images, a shape or range that is no image, or NaN in the map.

    Example:
        >>> photo = np.zeros((4, 6, 3), np.uint8)
        >>> heat = torch.tensor([[0.0, 1.0]])
        >>> overlay(photo, heat, colormap="gray", vmin=0, vmax=1)[0, :, 0].tolist()
        [0, 0, 43, 85, 128, 128]
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must lie in [0, 1], got {alpha}")
    draw = lookup(_BLENDS, blend, "blend")
    rgb = to_rgb(image)  # (H, W, 3)
    values = one_map(heat)  # (h, w)
    colors = "gray" if blend == "mask" else colormap
    scale = scale_of([heat], colors, vmin, vmax)
    lattice = getattr(heat, "lattice", None)
    pixel_values = _resized(values, rgb.shape[:2], lattice)  # (H, W)
    blended = draw(rgb, pixel_values, scale, alpha)
    if scale_bar:
        blended = _with_bar(blended, scale)
    return like(blended, image)


def _blend_alpha(
    rgb: np.ndarray,
    values: np.ndarray,
    scale: Scale,
    alpha: float,
) -> np.ndarray:
    return (1 - alpha) * rgb + alpha * scale.colors(values)


def _blend_mask(
    rgb: np.ndarray,
    values: np.ndarray,
    scale: Scale,
    alpha: float,
) -> np.ndarray:
    brightness = 1 - alpha * (1 - scale.unit(values))  # (H, W)
    return brightness[..., None] * rgb


def _blend_contour(
    rgb: np.ndarray,
    values: np.ndarray,
    scale: Scale,
    alpha: float,
) -> np.ndarray:
    picture = rgb.copy()
    shorter_side = min(rgb.shape[:2])
    width = max(1, round(shorter_side / 150))
    unit = scale.unit(values)  # (H, W)
    for level in (0.25, 0.5, 0.75):
        inside = unit >= level
        line = inside & ~_eroded(inside, width)
        # a white line along the colored one, because the lower colors vanish on dark photographs
        edge = inside & ~line & ~_eroded(inside, 2 * width)
        value = scale.low + level * (scale.high - scale.low)
        color = scale.colors(np.array(value))
        picture[line] = (1 - alpha) * rgb[line] + alpha * color
        picture[edge] = (1 - alpha) * rgb[edge] + alpha
    return picture


_BLENDS = {"alpha": _blend_alpha, "contour": _blend_contour, "mask": _blend_mask}


def _eroded(inside: np.ndarray, width: int) -> np.ndarray:
    """Return the pixels whose neighbors within `width` are all inside.

    What lies beyond the border counts as inside.
    """
    outside = torch.from_numpy(~inside)[None, None].float()  # (H, W) -> (1, 1, H, W)
    # each pixel takes the largest value of the square around it
    side = 2 * width + 1
    near_outside = F.max_pool2d(outside, side, stride=1, padding=width)
    return near_outside[0, 0].numpy() == 0


def _resized(
    values: np.ndarray,
    size: tuple[int, ...],
    lattice: Lattice | None,
) -> np.ndarray:
    if values.shape == size and lattice is None:
        return values
    batch = torch.from_numpy(np.ascontiguousarray(values))[None]  # (h, w) -> (1, h, w)
    height, width = size
    return resized(batch, (height, width), lattice)[0].numpy()


def _with_bar(picture: np.ndarray, scale: Scale) -> np.ndarray:
    bar = color_bar(scale, picture.shape[0])
    bar_rgb = np.asarray(bar, np.float32) / 255
    return np.concatenate([picture, bar_rgb], axis=1)
