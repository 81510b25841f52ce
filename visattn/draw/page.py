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
from visattn.draw.picture import to_bytes, to_pil
from visattn.draw.scale import Scale, scale_of, values_of
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
    counted = {"images": images, "names": names, "labels": labels, **heats}
    _check_counts(records[0].batch, counted)
    facts = [layer.facts for _, layer in stored]
    data = {
        "images": _describe_images(images, names, labels),
        "layers": facts,
        "heats": [_describe_heat(name, heat) for name, heat in heats.items()],
        "colors": _colors(colormap),
        **_abilities(facts),
    }
    arrays = _arrays_of_layers(stored, data["rollout"])
    for number, heat in enumerate(heats.values()):
        arrays[f"h-{number}"] = values_of(heat)
    # data and arrays become script elements of the one file
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
    records: list[Record],
    most_tokens_as_maps: int,
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


def _describe_images(
    images: Iterable,
    names: Sequence[str] | None,
    labels: Sequence[str] | None,
) -> list[dict]:
    descriptions = []
    for index, image in enumerate(images):
        photo = to_pil(image)
        photo.thumbnail((_LONGEST_SIDE_PIXELS, _LONGEST_SIDE_PIXELS))
        description = {
            "source": _source_of(photo),
            "width": photo.width,
            "height": photo.height,
            "name": str(names[index]) if names else f"image {index + 1}",
            "label": labels[index] if labels else "",
        }
        descriptions.append(description)
    return descriptions


def _source_of(photo: Image.Image) -> str:
    # few pixels are shown as large squares, on which the blocks of JPEG would be visible
    if max(photo.size) <= _LONGEST_SIDE_AS_PNG_PIXELS:
        return picture_source(photo, "png")
    return picture_source(photo, "jpeg", quality=88)


def _describe_heat(name: str, heat: Map) -> dict:
    scale = scale_of([heat])
    _, height, width = heat.values.shape
    grid = (height, width)
    details = [text for text in (heat.method, heat.layer) if text]
    prefix = heat.prefix_mass
    return {
        "name": name,
        "detail": ", ".join(details),
        "grid": list(grid),
        "lattice": lattice(heat.lattice, grid),
        "prefix": prefix if prefix is None else prefix.tolist(),
        "low": min(0.0, scale.low),
        "high": scale.high,
    }


def _arrays_of_layers(
    stored: list[tuple[Record, LayerPayload]],
    needs_rollout: bool,
) -> dict[str, Iterable]:
    """Return the arrays (B, ...) of all layers by the name of their script elements."""
    arrays: dict[str, Iterable] = {}
    for number, (_, layer) in enumerate(stored):
        for name, array in layer.arrays.items():
            arrays[f"b-{number}-{name}"] = array
    # where all layers store their maps, the page computes rollout by itself
    has_queries = any(layer.facts["form"] == "qk" for _, layer in stored)
    if needs_rollout and has_queries:
        records = [record for record, layer in stored if not layer.is_gate]
        arrays["s"] = rollouts(records)
    return arrays


def _abilities(layers: list[dict]) -> dict:
    """Return the first layer to show, the names of prefix tokens, and whether rollout is possible.

    Rollout needs rows that go from layer to layer: all with the same tokens as queries and keys.
    """
    start = len(layers) - 1
    sizes = set()
    most_prefix = 0
    for number, layer in enumerate(layers):
        if layer["form"] == "gate":
            continue
        start = number  # the last layer of tokens, where there is one
        sizes.add((layer["tokens"], layer["keys"], layer["prefix"]))
        most_prefix = max(most_prefix, layer["prefix"])
    names = ["class token"]
    for i in range(1, most_prefix):
        names.append(f"token {i + 1}")
    equal_sides = all(tokens == keys for tokens, keys, _ in sizes)
    return {
        "start": start,
        "rollout": len(sizes) == 1 and equal_sides,
        "prefix_names": names[:most_prefix],
    }


def _colors(colormap: str) -> list[int]:
    """Return the 256 colors of a colormap as a flat list of bytes."""
    scale_of([np.zeros((1, 1))], colormap)  # refuses unknown colormaps
    levels = np.arange(256, dtype=np.float32)
    colors = Scale(colormap, 0, 255).colors(levels)  # (256, 3)
    return to_bytes(colors).flatten().tolist()


def _fill_template(
    title: str,
    data: dict,
    arrays: Mapping[str, Iterable],
) -> str:
    folder = files("visattn.draw")

    def read(name: str) -> str:
        return (folder / name).read_text("utf-8")

    elements = []
    for name, batch in arrays.items():
        for image, array in enumerate(batch):
            elements.append(script_array(f"{name}-{image}", array))
    fields = {
        "title": title,
        "style": Markup(read("page.css")),
        "script": Markup(read("page_rows.js") + "\n" + read("page.js")),
        "data": script_json(data),
        "blobs": Markup("\n".join(elements)),
    }
    return fill(read("page.html"), fields)
