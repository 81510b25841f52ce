"""The color scale of a picture: which color a value has, and the bar that says so."""

from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib
import numpy as np
from PIL import Image, ImageDraw
from torch import Tensor

from visattn.draw.picture import FAINT, INK, PAPER, font
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
    heats: Sequence, colormap: str = "inferno", vmin: float | None = None, vmax: float | None = None
) -> Scale:
    """Return one scale shared by all the maps.

    A limit that is None is their smallest or largest value.
    """
    lookup(matplotlib.colormaps, colormap, "colormap")
    limits = [_limits(heat) for heat in heats]
    low = min(low for low, _ in limits) if vmin is None else float(vmin)
    high = max(high for _, high in limits) if vmax is None else float(vmax)
    # maps of one value have equal limits; chosen limits must differ
    chosen = vmin is not None and vmax is not None
    if low > high or (low == high and chosen):
        raise ValueError(f"vmin must be below vmax, got vmin={low:.4g} and vmax={high:.4g}")
    return Scale(colormap, low, high)


def values_of(heat) -> np.ndarray:
    """Return a map, tensor or array as a finite float32 array of two or three axes."""
    raw = heat.values if isinstance(heat, Map) else heat
    if isinstance(raw, Tensor):
        raw = raw.detach().float().cpu().numpy()
    values = np.asarray(raw, np.float32)
    if values.ndim not in (2, 3) or values.size == 0:
        raise ValueError(
            "heat must be (h, w) or (B, h, w) with at least one value, "
            f"got shape {tuple(values.shape)}"
        )
    not_finite = int((~np.isfinite(values)).sum())
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
    size = int(np.clip(height / 24, smallest_size, 15))  # of the font
    ticks = _ticks(scale, height, size)
    left = max(3, size // 2)
    thick = max(4, size)
    gap = size // 2
    text_width = max((int(font(size).getlength(text)) + 1 for _, text in ticks), default=0)
    strip = Image.new("RGB", (left + thick + gap + text_width + gap, height), PAPER)
    inset = size // 2 if height >= 4 * size else 0
    ramp = np.linspace(scale.high, scale.low, height - 2 * inset, dtype=np.float32)
    colors = np.repeat(to_bytes(scale.colors(ramp))[:, None], thick, axis=1)
    strip.paste(Image.fromarray(colors), (left, inset))
    pen = ImageDraw.Draw(strip)
    pen.rectangle((left - 1, inset - 1, left + thick, height - inset), outline=FAINT)
    for level, text in ticks:
        y = inset + (1 - level) * (height - 2 * inset - 1)
        y = np.clip(y, size / 2, height - size / 2)
        pen.text((left + thick + gap, y), text, INK, font(size), anchor="lm")
    return strip


def to_bytes(rgb: np.ndarray) -> np.ndarray:
    """Return colors in [0, 1] as uint8, rounded half up."""
    return np.floor(rgb * 255 + 0.5).astype(np.uint8)


def _ticks(scale: Scale, height: int, size: int) -> list[tuple[float, str]]:
    """Return where numbers stand on a bar, from 0 (low) to 1 (high), and the numbers."""
    if height < 2 * size:
        return []
    levels = [0.0, 1.0]
    if height >= 6 * size and scale.high > scale.low:
        levels.insert(1, 0.5)
    reach = scale.high - scale.low
    return [(level, _number(scale.low + level * reach, scale)) for level in levels]


def _number(value: float, scale: Scale) -> str:
    """Return three digits of a value; "0" where it is less than a thousandth of the scale."""
    largest = max(abs(scale.low), abs(scale.high))
    if abs(value) < 1e-3 * largest:
        return "0"
    return f"{value:.3g}"
