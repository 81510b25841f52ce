"""Any image file to 8 bits: grey, palette, transparent, CMYK, 16-bit, rotated by its EXIF tag."""

import io
import warnings

import numpy as np
from PIL import Image, ImageOps

MAX_PIXELS = 178_956_970  # where Pillow itself raises DecompressionBombError
_ORIENTATION = 0x0112  # the EXIF tag


def read_image(data: bytes, name: str, long_side: int | None = None) -> Image.Image:
    """Decode one file's bytes; whatever is wrong with it, the error names the file."""
    try:
        with warnings.catch_warnings():
            # Pillow warns of odd tags and big sizes, although it can read them
            warnings.simplefilter("ignore")
            return to_eight_bit(Image.open(io.BytesIO(data)), long_side)
    # decoders raise OSError, SyntaxError, struct.error, zlib.error, IndexError ...
    except Exception as error:
        raise ValueError(f"cannot read image {name!r}: {_explain(error)}") from error


def to_eight_bit(image: Image.Image, long_side: int | None = None) -> Image.Image:
    """RGB, or L if grey; upright, transparent pixels on white.

    A JPEG is decoded no finer than ``long_side`` needs.
    """
    if image.width * image.height > MAX_PIXELS:
        raise ValueError(
            f"{image.width} x {image.height} pixels are more than {MAX_PIXELS}: "
            "save it smaller first"
        )
    if long_side is not None:
        image.draft(None, (long_side, long_side))
    image.load()
    if image.getexif().get(_ORIENTATION, 1) != 1:
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith(("I", "F")):
        image = _scale_to_eight_bit(image)
    if image.has_transparency_data:
        # transparent pixels become white
        white = Image.new("RGBA", image.size, "white")
        white.alpha_composite(image.convert("RGBA"))
        image = white
    if image.mode in ("RGB", "L"):
        return image
    return image.convert("L" if image.mode == "1" else "RGB")


def _scale_to_eight_bit(image: Image.Image) -> Image.Image:
    """Scale 16-bit integers by 1/257, and floats by 255 if none exceeds 1.

    Pillow's own convert clips them.
    """
    values = np.asarray(image, dtype=np.float64)
    values = np.nan_to_num(values)
    largest = values.max(initial=0)
    if image.mode == "F" and largest <= 1:
        values = values * 255
    elif largest > 255:
        values = values / 257
    values = values.round().clip(0, 255)
    return Image.fromarray(values.astype(np.uint8))


def _explain(error: Exception) -> str:
    if isinstance(error, Image.UnidentifiedImageError):
        return "it is empty or not an image"  # Pillow's message names a buffer's address instead
    if isinstance(error, Image.DecompressionBombError):
        return f"it has more than {MAX_PIXELS} pixels: save it smaller first"
    return str(error) or type(error).__name__
