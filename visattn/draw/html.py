"""HTML in one offline file: templates with escaped fields, embedded pictures and numbers."""

import base64
import html
import io
import json
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image


class Markup(str):
    """Text that is HTML already: `fill` does not escape it."""


def fill(template: str, fields: Mapping[str, object]) -> Markup:
    """Replace every ``@name@`` of a template by its field, escaped unless it is `Markup`.

    One sweep: a field whose text looks like ``@name@`` is not replaced again.

    Example:
        >>> fill("<b>@name@</b>@rule@", {"name": "a < b", "rule": Markup("<hr>")})
        '<b>a &lt; b</b><hr>'
    """

    def replacement(match: re.Match) -> str:
        field = fields[match[1]]
        if isinstance(field, Markup):
            return field
        return html.escape(str(field))

    return Markup(re.sub(r"@(\w+)@", replacement, template))


def write_html(path: Path, text: str) -> None:
    """Write a file of HTML; what UTF-8 cannot express, such as a broken file name, becomes "?"."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8", errors="replace")


def picture_source(
    picture: Image.Image,
    file_format: str = "png",
    **options,
) -> str:
    """Return a picture as the ``src`` of an image; ``options`` are those of ``Image.save``."""
    file = io.BytesIO()
    picture.save(file, file_format, **options)
    return f"data:image/{file_format};base64,{base64.b64encode(file.getvalue()).decode()}"


def script_json(data: object) -> Markup:
    """Return data as JSON for a script element, which only "<" could end early."""
    text = json.dumps(data, ensure_ascii=False)
    return Markup(text.replace("<", "\\u003c").replace("\u2028", "\\u2028"))


def script_array(name: str, array: np.ndarray) -> Markup:
    """Return a script element that holds the bytes of an array, little-endian, as base64."""
    # what JavaScript's typed arrays read on every machine in use
    contiguous = np.ascontiguousarray(array)
    little_endian = contiguous.astype(contiguous.dtype.newbyteorder("<"), copy=False)
    text = base64.b64encode(little_endian.tobytes()).decode()
    element = f'<script id="@name@" type="application/octet-stream">{text}</script>'
    return fill(element, {"name": name})
