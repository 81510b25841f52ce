"""The color scale of a picture: which color a value has, and the bar that says so."""

from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib
import numpy as np
from PIL import Image, ImageDraw
from torch import Tensor

from visattn.draw.picture import FAINT, INK, blank_sheet, font, to_bytes
from visattn.map import Map
from visattn.names import lookup


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
        if reach <= 0:
            return np.zeros_like(values)
        return np.clip((values - self.low) / reach, 0, 1)

    def colors(self, values: np.ndarray) -> np.ndarray:
        """Return (..., 3) float32 RGB in [0, 1]."""
        rgba = matplotlib.colormaps[self.colormap](self.unit(values))
        return np.asarray(rgba, np.float32)[..., :3]


def scale_of(
    heats: Sequence,
    colormap: str = "inferno",
    vmin: float | None = None,
    vmax: float | None = None,
) -> Scale:
    """Return one scale shared by all the maps.

    A limit that is None is their smallest or largest value.
    """
    lookup(matplotlib.colormaps, colormap, "colormap")
    lows, highs = zip(*map(_limits, heats), strict=True)
    low = float(min(lows) if vmin is None else vmin)
    high = float(max(highs) if vmax is None else vmax)
    # maps of one value have equal limits; limits of the caller must differ
    must_differ = vmin is not None and vmax is not None
    if low > high or (must_differ and low == high):
        raise ValueError(f"vmin must be below vmax, got vmin={low:.4g} and vmax={high:.4g}")
    return Scale(colormap, low, high)


def values_of(heat) -> np.ndarray:
    """Return a map, tensor or array as a finite float32 array of two or three axes."""
    if isinstance(heat, Map):
        heat = heat.values
    if isinstance(heat, Tensor):
        heat = heat.detach().float().cpu().numpy()
    values = np.asarray(heat, np.float32)
    if values.ndim not in (2, 3) or values.size == 0:
        raise ValueError(
            "heat must be (h, w) or (B, h, w) with at least one value, "
            f"got shape {tuple(values.shape)}"
        )
    not_finite = values.size - np.isfinite(values).sum()
    if not_finite:
        raise ValueError(
            f"heat holds {not_finite} NaN or infinite values of {values.size}: nothing can be drawn"
        )
    return values


def _limits(heat) -> tuple[float, float]:
    values = values_of(heat)
    if isinstance(heat, Map) and heat.limits is not None:
        # one map of a batch is drawn on the scale of the batch
        return heat.limits
    return float(values.min()), float(values.max())


def one_map(heat) -> np.ndarray:
    """Return the (h, w) values of the map of a single image."""
    values = values_of(heat)
    if values.ndim == 3 and len(values) != 1:
        raise ValueError(
            f"heat holds the maps of {len(values)} images, one is drawn at a time: pass heat[i]"
        )
    return values.reshape(values.shape[-2:])


def color_bar(scale: Scale, height: int) -> Image.Image:
    """Return a bar of the scale's colors, with the values of both ends and the middle beside it.

    The height is in pixels.
    """
    smallest_size = 9 if height >= 40 else 7
    size = int(np.clip(height / 24, smallest_size, 15))  # of the font, in pixels
    ticks = _ticks(scale, height, size)
    text_width = 0
    for _, text in ticks:
        width = int(font(size).getlength(text)) + 1
        text_width = max(text_width, width)
    left = max(3, size // 2)
    right = left + max(4, size)
    text_left = right + size // 2
    top = 0
    if height >= 4 * size:
        top = size // 2  # half a line of text stands above the bar
    bar_height = height - 2 * top
    strip_width = text_left + text_width + size // 2
    strip = blank_sheet(strip_width, height)
    ramp = _draw_ramp(scale, right - left, bar_height)
    strip.paste(ramp, (left, top))
    pen = ImageDraw.Draw(strip)
    frame = (left - 1, top - 1, right, height - top)
    pen.rectangle(frame, outline=FAINT)
    for level, text in ticks:
        y = top + (1 - level) * (bar_height - 1)
        y = np.clip(y, size / 2, height - size / 2)
        pen.text((text_left, y), text, INK, font(size), anchor="lm")
    return strip


def _draw_ramp(
    scale: Scale,
    width: int,
    height: int,
) -> Image.Image:
    """Draw the colors of a scale from high (top) to low."""
    values = np.linspace(scale.high, scale.low, height, dtype=np.float32)
    column = to_bytes(scale.colors(values))[:, None]  # (height, 3) -> (height, 1, 3)
    return Image.fromarray(np.repeat(column, width, axis=1))


def _ticks(
    scale: Scale,
    height: int,
    size: int,
) -> list[tuple[float, str]]:
    """Return where numbers stand on a bar, from 0 (low) to 1 (high), and the numbers."""
    if height < 2 * size:
        return []
    levels = [0.0, 1.0]
    if height >= 6 * size and scale.high > scale.low:
        levels.insert(1, 0.5)
    reach = scale.high - scale.low
    ticks = []
    for level in levels:
        value = scale.low + level * reach
        ticks.append((level, _number(value, scale)))
    return ticks


def _number(value: float, scale: Scale) -> str:
    """Return three digits of a value; "0" where it is less than a thousandth of the scale."""
    largest = max(abs(scale.low), abs(scale.high))
    if abs(value) < 1e-3 * largest:
        return "0"
    return f"{value:.3g}"
