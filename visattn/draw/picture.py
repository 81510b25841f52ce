"""Images of any kind to RGB values and back, text on pictures, and panels side by side."""

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import matplotlib
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor

# RGB
PAPER = (255, 255, 255)
INK = (24, 24, 27)
FAINT = (95, 95, 105)

_LINE_GAP = 5  # pixels between the lines of a caption
_CAPTION_MARGIN = 4  # pixels at both ends of a line
_CHANNEL_COUNTS = (1, 3, 4)
_RANGE_TOLERANCE = 1e-4  # what resizing adds to a range of [0, 1]


def to_rgb(image) -> np.ndarray:
    """Return a PIL image, array (H, W[, C]) or tensor ([C,] H, W) as (H, W, 3) float32 in [0, 1].

    Arrays and tensors hold uint8 or floats in [0, 1]; one channel is repeated, a fourth is laid
    over white.
    """
    if isinstance(image, Image.Image):
        return _from_pil(image)
    if isinstance(image, Tensor):
        array = _from_tensor(image)
    elif isinstance(image, np.ndarray):
        array = image
    else:
        raise TypeError(
            f"image must be a PIL image, a numpy array or a tensor, got {type(image).__name__}"
        )
    if array.ndim == 2:
        array = array[..., None]  # (H, W) -> (H, W, 1)
    _check_shape(array, image)
    return _flatten(_unit_range(array))


def like(rgb: np.ndarray, image):
    """Return (H, W, 3) values in [0, 1] as an image of the type and precision of ``image``."""
    rgb = np.clip(rgb, 0, 1)
    if isinstance(image, Image.Image):
        return Image.fromarray(to_bytes(rgb))
    if isinstance(image, Tensor):
        values = torch.from_numpy(rgb)
        if not image.is_floating_point():
            values = torch.from_numpy(to_bytes(rgb))
        channels_first = values.permute(2, 0, 1)  # (H, W, 3) -> (3, H, W)
        return channels_first.contiguous().to(image.device, image.dtype)
    if image.dtype == np.uint8:
        return to_bytes(rgb)
    return rgb.astype(image.dtype)


def to_bytes(rgb: np.ndarray) -> np.ndarray:
    """Return colors in [0, 1] as uint8, rounded half up."""
    return np.floor(rgb * 255 + 0.5).astype(np.uint8)


def to_pil(image) -> Image.Image:
    """Return an image of any kind, or the photograph at a path, as a PIL image in RGB."""
    if isinstance(image, (str, Path)):
        with Image.open(image) as file:
            image = ImageOps.exif_transpose(file)
    return Image.fromarray(to_bytes(to_rgb(image)))


def enlarged(image: Image.Image, least: int = 320) -> Image.Image:
    """Return the image enlarged by a whole number, its shorter side about `least` pixels."""
    factor = round(least / min(image.size))
    factor = max(1, factor)
    size = (image.width * factor, image.height * factor)
    return image.resize(size, Image.Resampling.BICUBIC)


def with_caption(
    image: Image.Image,
    title: str,
    detail: str = "",
) -> Image.Image:
    """Return the image with a title and a fainter line of detail written below it."""
    size = int(np.clip(image.width / 26, 9, 20))  # of the font, in pixels
    lines = []
    if title:
        lines.append((title, size, INK))
    if detail:
        lines.append((detail, size - 3, FAINT))
    if not lines:
        return image.convert("RGB")
    spacing = size + _LINE_GAP
    caption_height = _LINE_GAP + len(lines) * spacing
    sheet = blank_sheet(image.width, image.height + caption_height)
    sheet.paste(image)
    pen = ImageDraw.Draw(sheet)
    y = image.height + _LINE_GAP
    for text, line_size, color in lines:
        line = fitted(text, line_size, image.width - 2 * _CAPTION_MARGIN)
        pen.text((_CAPTION_MARGIN, y), line, color, font(line_size))
        y += spacing
    return sheet


def blank_sheet(width: int, height: int) -> Image.Image:
    """Return white paper of a size in pixels."""
    return Image.new("RGB", (width, height), PAPER)


def beside(panels: Sequence[Image.Image], gap: int = 0) -> Image.Image:
    """Return the panels in one row, aligned at the top."""
    panels_width = sum(panel.width for panel in panels)
    gaps_width = gap * (len(panels) - 1)
    height = max(panel.height for panel in panels)
    sheet = blank_sheet(panels_width + gaps_width, height)
    x = 0
    for panel in panels:
        sheet.paste(panel, (x, 0))
        x += panel.width + gap
    return sheet


@lru_cache(maxsize=32)
def font(size: int) -> ImageFont.FreeTypeFont:
    """Return matplotlib's DejaVu Sans: every installation has it, and it covers more than Latin."""
    path = Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")
    return ImageFont.truetype(str(path), size)


def fitted(
    text: str,
    size: int,
    width: int,
) -> str:
    """Return the text on one line, cut with an ellipsis where it is wider than `width` pixels."""
    text = " ".join(str(text).split())
    if font(size).getlength(text) <= width:
        return text
    while text and font(size).getlength(text + "…") > width:
        text = text[:-1]
    return text + "…"


def _from_pil(image: Image.Image) -> np.ndarray:
    if image.mode.startswith("I") or image.mode == "F":
        gray = np.asarray(image, np.float32)
        unit = gray / _white_level(image.mode, gray)
        return _flatten(_unit_range(unit[..., None]))  # (H, W) -> (H, W, 1) -> (H, W, 3)
    mode = "RGBA" if image.has_transparency_data else "RGB"
    values = np.asarray(image.convert(mode), np.float32)
    return _flatten(values / 255)


def _white_level(mode: str, gray: np.ndarray) -> int:
    """Return the value of white: Pillow keeps 16-bit grays in modes I;16 and I."""
    if mode != "F":
        return 65535
    # Pillow says nothing about the range of mode F
    if gray.max(initial=0) > 1:
        return 255
    return 1


def _from_tensor(image: Tensor) -> np.ndarray:
    """Return the values of a tensor with the channels last."""
    values = image.detach().cpu()
    if values.is_floating_point():
        values = values.float()
    if values.ndim == 3:
        values = values.permute(1, 2, 0)  # (C, H, W) -> (H, W, C)
    return values.numpy()


def _check_shape(array: np.ndarray, image) -> None:
    """Refuse what is not (H, W, C) of at least one pixel; name the axes as ``image`` has them."""
    is_map = array.ndim == 3 and array.size > 0
    if is_map and array.shape[2] in _CHANNEL_COUNTS:
        return
    axes = "(C, H, W)" if isinstance(image, Tensor) else "(H, W, C)"
    raise ValueError(
        f"image must be (H, W) or {axes} with C of 1, 3 or 4, got shape {tuple(image.shape)}"
    )


def _unit_range(array: np.ndarray) -> np.ndarray:
    if array.dtype == np.uint8:
        return array.astype(np.float32) / 255
    if not np.issubdtype(array.dtype, np.floating):
        raise ValueError(f"image must hold uint8 or floats in [0, 1], got {array.dtype}")
    low = float(array.min())
    high = float(array.max())
    # written so that NaN, which compares with nothing, is refused
    in_range = low >= -_RANGE_TOLERANCE and high <= 1 + _RANGE_TOLERANCE
    if not in_range:
        raise ValueError(
            f"a float image must lie in [0, 1], got values from {low:.3g} to {high:.3g}: "
            "undo the model's normalization, or pass uint8"
        )
    return np.clip(array, 0, 1).astype(np.float32)


def _flatten(array: np.ndarray) -> np.ndarray:
    """Return (H, W, 3): one channel is repeated, a fourth is opacity over white."""
    if array.shape[2] == 1:
        return np.repeat(array, 3, axis=2)
    if array.shape[2] == 3:
        return array
    colors = array[..., :3]
    opacity = array[..., 3:]
    return colors * opacity + (1 - opacity)
