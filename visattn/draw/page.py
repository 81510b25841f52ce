"""Page: one offline file in which a reader clicks a patch and sees what it attends."""

from collections.abc import Iterable, Mapping, Sequence
from importlib.resources import files
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from visattn.draw.html import (
    Markup,
    fill,
    picture_source,
    script_array,
    script_json,
    write_html,
)
from visattn.draw.payload import MOST_TOKENS_AS_MAPS, LayerPayload, lattice, layer_of, rollouts
from visattn.draw.picture import to_pil
from visattn.draw.scale import Scale, scale_of, to_bytes, values_of
from visattn.map import Map
from visattn.record.entry import Record
from visattn.record.session import Maps

_LONGEST_SIDE_PIXELS = 768
_LONGEST_SIDE_AS_PNG_PIXELS = 128


def page(
    images: Sequence | Tensor,
    maps: Maps,
    path: str | Path,
    *,
    heats: Mapping[str, Map] | None = None,
    names: Sequence[str] | None = None,
    labels: Sequence[str] | None = None,
    layers: Sequence[int] | None = None,
    colormap: str = "inferno",
    title: str = "What each patch attends",
    most_tokens_as_maps: int = MOST_TOKENS_AS_MAPS,
) -> Path:
    """Write one self-contained HTML file: click or hover a patch and see what it attends.

    A layer is stored in one of two forms. Small layers store their maps, 8 bits per weight and a
    range per row. Layers with more keys than ``most_tokens_as_maps`` store queries and keys in half
    precision, and the page computes the softmax; where the weights are no softmax of inner products
    alone (other similarities and normalizers, biases, masks, windows) they store their maps as
    well. The page computes rollout.

    Args:
        images: The images of the recorded batch as the model saw them, without its normalization:
            PIL, or in [0, 1].
        maps: What `capture` recorded of one batch.
        path: The file to write.
        heats: Maps to switch to, by name, such as ``{"gae": explain(...)}``.
        names, labels: One per image: file name, and a line such as the predicted class.
        layers: Which of ``maps.layers`` to store, by index; None stores all that lie on a grid.
        colormap: Name of a matplotlib colormap.
        title: Heading of the page.
        most_tokens_as_maps: Up to this number of keys a layer stores its maps.

    Returns:
        The path.

    Raises:
        ValueError: counts of images, maps, names or labels that differ; no layer that lies on a
            grid; NaN.
    """
    heats = dict(heats or {})
    records = _select(maps.layers, layers)
    stored = _layers_on_a_grid(records, most_tokens_as_maps)
    _check_counts(records[0].batch, {"images": images, "names": names, "labels": labels, **heats})
    facts = [layer.facts for _, layer in stored]
    abilities = _abilities(facts)
    data = {
        "images": [_image(to_pil(image), i, names, labels) for i, image in enumerate(images)],
        "layers": facts,
        "heats": [_heat(name, heat) for name, heat in heats.items()],
        "colors": _colors(colormap),
        **abilities,
    }
    arrays: dict[str, Iterable] = {}
    for number, (_, layer) in enumerate(stored):
        for name, array in layer.arrays.items():
            arrays[f"b-{number}-{name}"] = array
    if abilities["rollout"] and any(layer["form"] == "qk" for layer in facts):
        arrays["s"] = rollouts([record for record, layer in stored if not layer.is_gate])
    for number, heat in enumerate(heats.values()):
        arrays[f"h-{number}"] = values_of(heat)
    path = Path(path)
    write_html(path, _fill_template(title, data, arrays))
    return path


def _select(records: Sequence[Record], layers: Sequence[int] | None) -> list[Record]:
    if layers is None:
        return list(records)
    for index in layers:
        if not -len(records) <= index < len(records):
            raise ValueError(f"layers must be indices below {len(records)}, got {index}")
    return [records[index] for index in layers]


def _layers_on_a_grid(
    records: list[Record], most_tokens_as_maps: int
) -> list[tuple[Record, LayerPayload]]:
    stored = []
    for record in records:
        layer = layer_of(record, most_tokens_as_maps)
        if layer is not None:
            stored.append((record, layer))
    if not stored:
        recorded = ", ".join(f"{record.name} ({record.kind})" for record in records) or "nothing"
        raise ValueError(f"maps must hold a layer whose keys lie on a grid, got {recorded}")
    return stored


def _check_counts(count: int, arguments: Mapping) -> None:
    for name, entries in arguments.items():
        if entries is not None and len(entries) != count:
            raise ValueError(
                f"{name} must be as many as the recorded images, got {len(entries)} and {count}"
            )


def _image(photo: Image.Image, index: int, names, labels) -> dict:
    photo.thumbnail((_LONGEST_SIDE_PIXELS, _LONGEST_SIDE_PIXELS))
    # few pixels are shown as large squares, on which the blocks of JPEG would be visible
    if max(photo.size) <= _LONGEST_SIDE_AS_PNG_PIXELS:
        source = picture_source(photo, "png")
    else:
        source = picture_source(photo, "jpeg", quality=88)
    return {
        "source": source,
        "width": photo.width,
        "height": photo.height,
        "name": str(names[index]) if names else f"image {index + 1}",
        "label": labels[index] if labels else "",
    }


def _heat(name: str, heat: Map) -> dict:
    scale = scale_of([heat])
    grid = heat.values.shape[1:]
    return {
        "name": name,
        "detail": ", ".join(filter(None, (heat.method, heat.layer))),
        "grid": list(grid),
        "lattice": lattice(heat.lattice, grid),
        "prefix": None if heat.prefix_mass is None else heat.prefix_mass.tolist(),
        "low": min(0.0, scale.low),
        "high": scale.high,
    }


def _abilities(layers: list[dict]) -> dict:
    """Return the first layer to show, the names of prefix tokens, and whether rollout is possible.

    Rollout needs rows that go from layer to layer: all with the same tokens as queries and keys.
    """
    token_layers = [i for i, layer in enumerate(layers) if layer["form"] != "gate"]
    sizes = set()
    prefix = 0
    for i in token_layers:
        layer = layers[i]
        sizes.add((layer["tokens"], layer["keys"], layer["prefix"]))
        prefix = max(prefix, layer["prefix"])
    names = ["class token", *(f"token {i + 1}" for i in range(1, prefix))]
    return {
        "start": token_layers[-1] if token_layers else len(layers) - 1,
        "rollout": len(sizes) == 1 and all(tokens == keys for tokens, keys, _ in sizes),
        "prefix_names": names[:prefix],
    }


def _colors(colormap: str) -> list[int]:
    """Return the 256 colors of a colormap as a flat list of bytes."""
    scale_of([np.zeros((1, 1))], colormap)  # refuses unknown colormaps
    levels = np.arange(256, dtype=np.float32)
    return to_bytes(Scale(colormap, 0, 255).colors(levels)).flatten().tolist()


def _fill_template(title: str, data: dict, arrays: Mapping[str, Iterable]) -> str:
    folder = files("visattn.draw")
    scripts = [(folder / name).read_text("utf-8") for name in ("page_rows.js", "page.js")]
    elements = []
    for name, batch in arrays.items():
        for image, array in enumerate(batch):
            elements.append(script_array(f"{name}-{image}", array))
    fields = {
        "title": title,
        "style": Markup((folder / "page.css").read_text("utf-8")),
        "script": Markup("\n".join(scripts)),
        "data": script_json(data),
        "blobs": Markup("\n".join(elements)),
    }
    return fill((folder / "page.html").read_text("utf-8"), fields)
