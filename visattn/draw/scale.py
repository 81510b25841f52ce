"""The color scale of a picture: which color a value has, and the bar that says so."""

from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches

import matplotlib
import numpy as np
from PIL import Image, ImageDraw
from torch import Tensor

from visattn.draw.picture import FAINT, INK, PAPER, font
from visattn.map import Map


@dataclass(frozen=True)
class Scale:
    """Colors for values between two limits; values beyond them take the color of the nearer limit.

    Args:
        colormap: Name of a matplotlib colormap.
        low: Value of the first color.
        high: Value of the last color.

    Example:
        >>> Scale("gray", 2.0, 4.0).colors(np.array([2.0, 4.0, 9.0]))[:, 0].tolist()
        [0.0, 1.0, 1.0]
    """

    colormap: str
    low: float
    high: float

    def unit(self, values: np.ndarray) -> np.ndarray:
        """Return the values as parts of the way from low to high, in [0, 1]."""
        reach = self.high - self.low
        return np.clip((values - self.low) / reach, 0, 1) if reach > 0 else np.zeros_like(values)

    def colors(self, values: np.ndarray) -> np.ndarray:
        """Return (..., 3) float32 RGB in [0, 1]."""
        return np.asarray(matplotlib.colormaps[self.colormap](self.unit(values)), np.float32)[
            ..., :3
        ]


def scale_of(
    heats: Sequence, colormap: str = "inferno", vmin: float | None = None, vmax: float | None = None
) -> Scale:
    """Return one scale shared by all the maps given; a limit that is None is their smallest or largest value."""
    if colormap not in matplotlib.colormaps:
        near = get_close_matches(str(colormap), list(matplotlib.colormaps), n=1, cutoff=0.4) or [
            "inferno"
        ]
        raise ValueError(
            f"colormap must be one of matplotlib's, got {colormap!r}; nearest is {near[0]!r}"
        )
    ends = [_limits(heat) for heat in heats]
    low = min(end[0] for end in ends) if vmin is None else float(vmin)
    high = max(end[1] for end in ends) if vmax is None else float(vmax)
    if low > high or (low == high and None not in (vmin, vmax)):
        raise ValueError(f"vmin must be below vmax, got vmin={low:.4g} and vmax={high:.4g}")
    return Scale(colormap, low, high)


def values_of(heat) -> np.ndarray:
    """Return a map, tensor or array as a finite float32 array of two or three axes."""
    values = heat.values if isinstance(heat, Map) else heat
    values = (
        values.detach().float().cpu().numpy()
        if isinstance(values, Tensor)
        else np.asarray(values, np.float32)
    )
    if values.ndim not in (2, 3) or values.size == 0:
        raise ValueError(
            f"heat must be (h, w) or (B, h, w) with at least one value, got shape {tuple(values.shape)}"
        )
    bad = ~np.isfinite(values)
    if bad.any():
        raise ValueError(
            f"heat holds {int(bad.sum())} NaN or infinite values of {values.size}: nothing can be drawn"
        )
    return values


def _limits(heat) -> tuple[float, float]:
    values = values_of(heat)
    picked = heat.limits if isinstance(heat, Map) else None
    return picked or (float(values.min()), float(values.max()))


def one_map(heat) -> np.ndarray:
    """Return the (h, w) values of the map of a single image."""
    values = values_of(heat)
    if values.ndim == 3 and len(values) != 1:
        raise ValueError(
            f"heat holds the maps of {len(values)} images, one is drawn at a time: pass heat[i]"
        )
    return values.reshape(values.shape[-2:])


def color_bar(scale: Scale, height: int) -> Image.Image:
    """Return a bar of the scale's colors, as high as asked, with the values of both ends and the middle beside it."""
    size = int(np.clip(height / 24, 9 if height >= 40 else 7, 15))
    ticks = _ticks(scale, height, size)
    left, thick = max(3, size // 2), max(4, size)
    text_width = max((int(font(size).getlength(text)) + 1 for _, text in ticks), default=0)
    strip = Image.new("RGB", (left + thick + size // 2 + text_width + size // 2, height), PAPER)
    inset = size // 2 if height >= 4 * size else 0
    ramp = np.linspace(scale.high, scale.low, height - 2 * inset, dtype=np.float32)
    colors = np.repeat(to_bytes(scale.colors(ramp))[:, None], thick, axis=1)
    strip.paste(Image.fromarray(colors), (left, inset))
    pen = ImageDraw.Draw(strip)
    pen.rectangle((left - 1, inset - 1, left + thick, height - inset), outline=FAINT)
    for part, text in ticks:
        y = np.clip(inset + (1 - part) * (height - 2 * inset - 1), size / 2, height - size / 2)
        pen.text((left + thick + size // 2, y), text, INK, font(size), anchor="lm")
    return strip


def to_bytes(rgb: np.ndarray) -> np.ndarray:
    """Return colors in [0, 1] as uint8, rounded half up."""
    return np.floor(rgb * 255 + 0.5).astype(np.uint8)


def _ticks(scale: Scale, height: int, size: int) -> list[tuple[float, str]]:
    if height < 2 * size:
        return []
    parts = (0.0, 0.5, 1.0) if height >= 6 * size and scale.high > scale.low else (0.0, 1.0)
    return [(part, _number(scale.low + part * (scale.high - scale.low), scale)) for part in parts]


def _number(value: float, scale: Scale) -> str:
    """Return three digits of a value; what no pixel could show beside the other end of the scale is written 0."""
    return "0" if abs(value) < 1e-3 * max(abs(scale.low), abs(scale.high)) else f"{value:.3g}"
