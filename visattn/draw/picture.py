"""Images of any kind to RGB values and back, text on pictures, and panels side by side."""

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import matplotlib
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor

PAPER, INK, FAINT = (255, 255, 255), (24, 24, 27), (95, 95, 105)


def to_rgb(image) -> np.ndarray:
    """Return a PIL image, array (H, W[, C]) or tensor ([C,] H, W) as (H, W, 3) float32 in [0, 1].

    Arrays and tensors hold uint8 or floats in [0, 1]; one channel is repeated, a fourth is laid
    over white.
    """
    if isinstance(image, Image.Image):
        return _from_pil(image)
    if isinstance(image, Tensor):
        array = image.detach().cpu()
        array = (array.float() if array.is_floating_point() else array).numpy()
        array = array.transpose(1, 2, 0) if array.ndim == 3 else array
    elif isinstance(image, np.ndarray):
        array = image
    else:
        raise TypeError(
            f"image must be a PIL image, a numpy array or a tensor, got {type(image).__name__}"
        )
    return _flatten(_unit_range(_with_channels(array, image)))


def like(rgb: np.ndarray, image):
    """Return (H, W, 3) values in [0, 1] as the same kind of image as the one given."""
    rgb = np.clip(rgb, 0, 1)
    whole = np.floor(rgb * 255 + 0.5).astype(np.uint8)
    if isinstance(image, Image.Image):
        return Image.fromarray(whole)
    if isinstance(image, Tensor):
        values = (
            torch.from_numpy(rgb if image.is_floating_point() else whole)
            .permute(2, 0, 1)
            .contiguous()
        )
        return values.to(image.device, image.dtype)
    return whole if image.dtype == np.uint8 else rgb.astype(image.dtype)


def to_pil(image) -> Image.Image:
    """Return an image of any kind, or the photograph at a path, as a PIL image in RGB."""
    if isinstance(image, (str, Path)):
        with Image.open(image) as file:
            image = ImageOps.exif_transpose(file)
    return Image.fromarray(np.floor(to_rgb(image) * 255 + 0.5).astype(np.uint8))


def enlarged(image: Image.Image, least: int = 320) -> Image.Image:
    """Return the image enlarged by a whole number, its shorter side about `least` pixels."""
    factor = max(1, round(least / min(image.size)))
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.BICUBIC)


def with_caption(image: Image.Image, title: str, detail: str = "") -> Image.Image:
    """Return the image with a title and a fainter line of detail written below it."""
    size = int(np.clip(image.width / 26, 9, 20))
    lines = [
        (text, size - 3 * faint, FAINT if faint else INK)
        for faint, text in enumerate((title, detail))
        if text
    ]
    sheet = Image.new(
        "RGB", (image.width, image.height + len(lines) * (size + 5) + 5 * bool(lines)), PAPER
    )
    sheet.paste(image)
    pen = ImageDraw.Draw(sheet)
    for row, (text, points, color) in enumerate(lines):
        line = fitted(text, points, image.width - 8)
        pen.text((4, image.height + 5 + row * (size + 5)), line, color, font(points))
    return sheet


def beside(panels: Sequence[Image.Image], gap: int = 0) -> Image.Image:
    """Return the panels in one row, aligned at the top."""
    width = sum(panel.width for panel in panels) + gap * (len(panels) - 1)
    sheet = Image.new("RGB", (width, max(panel.height for panel in panels)), PAPER)
    x = 0
    for panel in panels:
        sheet.paste(panel, (x, 0))
        x += panel.width + gap
    return sheet


@lru_cache(maxsize=32)
def font(size: int) -> ImageFont.FreeTypeFont:
    """Return matplotlib's DejaVu Sans: every installation has it, and it covers more than Latin."""
    return ImageFont.truetype(
        str(Path(matplotlib.get_data_path(), "fonts/ttf/DejaVuSans.ttf")), size
    )


def fitted(text: str, size: int, width: int) -> str:
    """Return the text on one line, cut with an ellipsis where it is wider than `width` pixels."""
    text = " ".join(str(text).split())
    if font(size).getlength(text) <= width:
        return text
    while text and font(size).getlength(text + "…") > width:
        text = text[:-1]
    return text + "…"


def _from_pil(image: Image.Image) -> np.ndarray:
    if image.mode.startswith("I") or image.mode == "F":
        array = np.asarray(image, np.float32)
        # Pillow keeps 16-bit greys in modes I;16 and I, and says nothing about the range of mode F
        array = array / (65535 if image.mode != "F" else 255 if array.max(initial=0) > 1 else 1)
        return _flatten(_unit_range(array[..., None]))
    mode = "RGBA" if image.has_transparency_data else "RGB"
    return _flatten(np.asarray(image.convert(mode), np.float32) / 255)


def _with_channels(array: np.ndarray, image) -> np.ndarray:
    array = array[..., None] if array.ndim == 2 else array
    if array.ndim != 3 or array.shape[2] not in (1, 3, 4) or 0 in array.shape:
        axes = "(C, H, W)" if isinstance(image, Tensor) else "(H, W, C)"
        raise ValueError(
            f"image must be (H, W) or {axes} with C of 1, 3 or 4, got shape {tuple(image.shape)}"
        )
    return array


def _unit_range(array: np.ndarray) -> np.ndarray:
    if array.dtype == np.uint8:
        return array.astype(np.float32) / 255
    if not np.issubdtype(array.dtype, np.floating):
        raise ValueError(f"image must hold uint8 or floats in [0, 1], got {array.dtype}")
    low, high = float(array.min()), float(array.max())
    if not (low >= -1e-4 and high <= 1 + 1e-4):
        raise ValueError(
            f"a float image must lie in [0, 1], got values from {low:.3g} to {high:.3g}: "
            "undo the model's normalization, or pass uint8"
        )
    return np.clip(array, 0, 1).astype(np.float32)


def _flatten(array: np.ndarray) -> np.ndarray:
    if array.shape[2] == 4:
        return array[..., :3] * array[..., 3:] + (1 - array[..., 3:])
    return np.repeat(array, 3, axis=2) if array.shape[2] == 1 else array
