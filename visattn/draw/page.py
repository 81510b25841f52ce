"""Page: one offline file in which a reader clicks a patch and sees what it attends."""

import base64
import html
import io
import json
import re
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from visattn.draw.payload import lattice, layer_of, rollouts
from visattn.draw.picture import to_pil
from visattn.draw.scale import Scale, scale_of, to_bytes, values_of
from visattn.map import Map

_LONGEST_SIDE = 768


def page(
    maps,
    images: Sequence | Tensor,
    path: str | Path,
    *,
    heats: Mapping[str, Map] | None = None,
    names: Sequence[str] | None = None,
    labels: Sequence[str] | None = None,
    layers: Sequence[int] | None = None,
    colormap: str = "inferno",
    title: str = "What each patch attends",
) -> Path:
    """Write one self-contained HTML file: click or hover a patch and see what it attends, in any layer and head.

    Up to 400 tokens the maps themselves are stored, 8 bits each and a range per row; above it
    queries and keys in half precision, and the page computes the softmax. Where the weights are no
    softmax of inner products alone (other normalizers, biases, masks, windows) the maps are stored
    at any size. Rollout is computed in the page.

    Args:
        maps: What `capture` recorded of one batch.
        images: The images of that batch as the model saw them, without its normalization: PIL, or
            in [0, 1].
        path: The file to write.
        heats: Finished maps to switch to, by name, such as ``{"gae": explain(...)}``.
        names, labels: One per image: file name, and a line such as the predicted class.
        layers: Which of ``maps.layers`` to keep, by index; None keeps all that lie on a grid.
        colormap: Name of a matplotlib colormap.
        title: Heading of the page.

    Returns:
        The path.

    Raises:
        ValueError: counts of images, maps, names or labels that differ; no layer that lies on a
            grid; NaN.
    """
    records = (
        list(maps.layers) if layers is None else [_picked(maps.layers, index) for index in layers]
    )
    pairs = [(record, layer) for record in records if (layer := layer_of(record)) is not None]
    kept, shown = [record for record, _ in pairs], [layer for _, layer in pairs]
    if not shown:
        seen = ", ".join(f"{record.name} ({record.kind})" for record in records) or "nothing"
        raise ValueError(f"maps must hold a layer whose keys lie on a grid, got {seen}")
    heats = dict(heats or {})
    _check_counts(records[0].batch, {"images": images, "names": names, "labels": labels, **heats})
    facts = [layer[0] for layer in shown]
    data = {
        "images": [_image(to_pil(image), i, names, labels) for i, image in enumerate(images)],
        "layers": facts,
        "heats": [_heat(name, heat) for name, heat in heats.items()],
        "colors": _colors(colormap),
        **_abilities(facts),
    }
    parts = {
        f"b-{i}-{name}": part for i, layer in enumerate(shown) for name, part in layer[1].items()
    }
    if data["rollout"] and any(layer["form"] == "qk" for layer in facts):
        parts["s"] = rollouts(
            [record for record, layer in zip(kept, facts, strict=True) if layer["form"] != "gate"]
        )
    parts |= {f"h-{i}": values_of(heat) for i, heat in enumerate(heats.values())}
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(_assembled(title, data, parts), encoding="utf-8")
    return path


def _picked(records, index: int):
    if not -len(records) <= index < len(records):
        raise ValueError(f"layers must be indices below {len(records)}, got {index}")
    return records[index]


def _check_counts(count: int, given: dict) -> None:
    for name, entries in given.items():
        if entries is not None and len(entries) != count:
            raise ValueError(
                f"{name} must be as many as the recorded images, got {len(entries)} and {count}"
            )


def _image(photo: Image.Image, index: int, names, labels) -> dict:
    photo.thumbnail((_LONGEST_SIDE, _LONGEST_SIDE))
    # few pixels are shown as large squares, where the blocks of JPEG would be seen
    kind, options = ("png", {}) if max(photo.size) <= 128 else ("jpeg", {"quality": 88})
    file = io.BytesIO()
    photo.save(file, kind, **options)
    source = f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"
    text = {
        "name": str(names[index]) if names else f"image {index + 1}",
        "label": labels[index] if labels else "",
    }
    return {"source": source, "width": photo.width, "height": photo.height, **text}


def _heat(name: str, heat: Map) -> dict:
    scale = scale_of([heat])
    mass = None if heat.prefix_mass is None else heat.prefix_mass.tolist()
    detail = ", ".join(part for part in (heat.method, heat.layer) if part)
    place = {
        "grid": list(heat.values.shape[1:]),
        "lattice": lattice(heat.lattice, heat.values.shape[1:]),
    }
    return {
        "name": name,
        "detail": detail,
        **place,
        "prefix": mass,
        "low": min(0.0, scale.low),
        "high": scale.high,
    }


def _abilities(layers: list[dict]) -> dict:
    """Return where the page starts, what its queries are called, and whether rows can be chained through the layers."""
    token = [i for i, layer in enumerate(layers) if layer["form"] != "gate"]
    sizes = {(layers[i]["tokens"], layers[i]["keys"], layers[i]["prefix"]) for i in token}
    chained = len(sizes) == 1 and all(tokens == keys for tokens, keys, _ in sizes)
    prefix = max((layers[i]["prefix"] for i in token), default=0)
    names = ["class token", *(f"token {i + 1}" for i in range(1, prefix))][:prefix]
    return {
        "start": token[-1] if token else len(layers) - 1,
        "rollout": chained,
        "prefix_names": names,
    }


def _colors(colormap: str) -> list[int]:
    scale_of([np.zeros((1, 1))], colormap)
    return (
        to_bytes(Scale(colormap, 0, 255).colors(np.arange(256, dtype=np.float32)))
        .flatten()
        .tolist()
    )


def _assembled(title: str, data: dict, parts: dict) -> str:
    """Fill the template in one sweep, so that nothing inside a file name can be taken for a place to fill."""
    folder = files("visattn.draw")
    # "<" is all that could end a script element early
    text = json.dumps(data, ensure_ascii=False).replace("<", "\\u003c").replace("\u2028", "\\u2028")
    filling = {
        "title": html.escape(title),
        "style": (folder / "page.css").read_text("utf-8"),
        "script": "\n".join(
            (folder / name).read_text("utf-8") for name in ("page_rows.js", "page.js")
        ),
        "data": text,
        "blobs": "\n".join(
            _blob(name, i, part) for name, whole in parts.items() for i, part in enumerate(whole)
        ),
    }
    return re.sub(
        r"@(\w+)@", lambda found: filling[found[1]], (folder / "page.html").read_text("utf-8")
    )


def _blob(name: str, image: int, part) -> str:
    array = np.ascontiguousarray(part)
    little = array.astype(array.dtype.newbyteorder("<"), copy=False)
    text = base64.b64encode(little.tobytes()).decode()
    return f'<script id="{name}-{image}" type="application/octet-stream">{text}</script>'
