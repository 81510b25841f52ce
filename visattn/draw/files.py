"""Save: the maps of many images as pictures, numbers and an index."""

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from visattn.draw.overlay import overlay
from visattn.draw.picture import beside, enlarged, to_pil, with_caption
from visattn.draw.scale import Scale, color_bar, scale_of, values_of
from visattn.map import Map

_LONGEST_NAME = 120  # characters, which leaves room for a number and an ending


def save_maps(
    images: Iterable,
    heat: Map,
    folder: str | Path,
    *,
    names: Sequence[str] | None = None,
    labels: Sequence[str] | None = None,
    facts: Sequence[dict] | None = None,
    colormap: str = "inferno",
    alpha: float = 0.5,
    vmin: float | None = None,
    vmax: float | None = None,
    blend: str = "alpha",
    own_scale: bool = False,
) -> list[dict]:
    """Write the maps of many images as pictures and numbers.

    Each image has NAME.png (overlay, scale bar, label) and NAME.npz (the raw map); one index.json
    lists them.

    All pictures share one scale, from the smallest to the largest value of the maps unless ``vmin``
    and ``vmax`` say otherwise. Small images are enlarged by a whole number, to be legible.

    Args:
        images: The images, or paths of photographs; a generator is read one by one.
        heat: The maps, one per image.
        folder: Where to write; made if it does not exist.
        names: File names without ending; None takes those of paths, else 0000, 0001, ... Equal
            names get a number.
        labels: One line per image to write below it, such as the predicted class with its
            probability.
        facts: Additional items of index.json, one dictionary per image.
        colormap, alpha, vmin, vmax, blend: As for `overlay`.
        own_scale: Give each picture the scale of its own map: then only the numbers beside the bars
            compare.

    Returns:
        The items of index.json: picture, map, name, label, shape, smallest and largest value,
        target, prefix_mass.

    Raises:
        ValueError: counts of maps, images, names or labels that differ, NaN maps, an unknown
            colormap.
        NotADirectoryError, PermissionError: the folder cannot be written.
    """
    if values_of(heat).ndim == 2:
        # the map of one image is a batch of one
        heat = replace(heat, values=heat.values[None])
    counted = {"images": images, "names": names, "labels": labels, "facts": facts}
    _check_counts(len(heat), counted)
    colors = "gray" if blend == "mask" else colormap
    scale = scale_of([heat], colors, vmin, vmax)
    folder = writable(Path(folder))
    used_names: set[str] = set()
    items = []
    for index, image in enumerate(_exactly(images, len(heat))):
        wanted_name = names[index] if names else _stem(image, index)
        name = _free_name(wanted_name, used_names)
        label = labels[index] if labels else ""
        single = heat[index]
        if own_scale:
            scale = scale_of([single.values], colors, vmin, vmax)
        drawn = picture(single, image, label, scale, alpha, blend)
        drawn.save(folder / f"{name}.png")
        np.savez_compressed(folder / f"{name}.npz", values=_as_array(single))
        item = _item(name, label, single, scale)
        if facts:
            item |= facts[index]
        items.append(item)
    index_data = {
        "method": heat.method,
        "layer": heat.layer,
        "colormap": colors,
        "blend": blend,
        "own_scale": own_scale,
        "images": items,
    }
    _write_json(folder / "index.json", index_data)
    return items


def picture(
    heat: Map,
    image,
    label: str,
    scale: Scale,
    alpha: float,
    blend: str,
) -> Image.Image:
    """Return the picture of one map: overlay, scale bar, and its label and details below."""
    photo = enlarged(to_pil(image))
    # the scale of the caller counts, not the one of the batch
    heat = replace(heat, limits=None)
    vmin: float | None = scale.low
    vmax: float | None = scale.high
    if scale.low >= scale.high:
        # a map of one value has no range to draw on
        vmin = vmax = None
    drawn = overlay(
        photo,
        heat,
        colormap=scale.colormap,
        alpha=alpha,
        vmin=vmin,
        vmax=vmax,
        blend=blend,
    )
    bar = color_bar(scale, drawn.height)
    return with_caption(beside([drawn, bar]), label, _detail(heat))


def _detail(heat: Map) -> str:
    """Return what a caption says of a map: method, target, mass on prefix tokens, layer."""
    details = [heat.method]
    if heat.target is not None:
        details.append(f"target {_plain(heat.target)}")
    if heat.prefix_mass is not None:
        details.append(f"{float(heat.prefix_mass):.0%} on prefix tokens")
    details.append(heat.layer)
    return ", ".join(filter(None, details))


def _check_counts(count: int, arguments: Mapping[str, object]) -> None:
    for name, entries in arguments.items():
        if isinstance(entries, Sized) and len(entries) != count:
            raise ValueError(
                f"{name} must be as many as the maps: got {len(entries)} {name} and {count} maps"
            )


def _exactly(images: Iterable, count: int) -> Iterator:
    """Yield the images; refuse fewer or more of them than maps."""
    if _is_single(images):
        raise ValueError(
            "images must be a list or batch with one image per map, got a single image: "
            "wrap it in a list"
        )
    index = 0
    for index, image in enumerate(images, 1):
        if index > count:
            raise ValueError(
                f"images must be as many as the maps: got {count} images and more and {count} maps"
            )
        yield image
    if index < count:
        raise ValueError(
            f"images must be as many as the maps: got only {index} images and {count} maps"
        )


def _is_single(images: Iterable) -> bool:
    """Whether these are the path, or the axes, of one image alone."""
    if isinstance(images, (np.ndarray, Tensor)):
        return images.ndim < 4
    return isinstance(images, (str, Path))


def writable(folder: Path) -> Path:
    """Return the folder, made if it did not exist, after trying to write into it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".visattn-write-test"
        probe.touch()
        probe.unlink()
    except FileExistsError:
        raise NotADirectoryError(f"folder must be a directory, but {folder} is a file") from None
    except PermissionError:
        raise PermissionError(f"folder {folder} cannot be written: choose another one") from None
    return folder


def _stem(image, index: int) -> str:
    if isinstance(image, (str, Path)):
        return Path(image).stem
    return f"{index:04d}"


def _free_name(name: str, used_names: set[str]) -> str:
    """Return a file name that every file system takes and no other image has."""
    allowed = re.sub(r"[^\w.+-]+", "_", Path(name).name)
    stem = allowed.strip("._")[:_LONGEST_NAME]
    if not stem:
        stem = "image"
    number = 1
    free = stem
    # some file systems do not tell upper from lower case
    while free.lower() in used_names:
        number += 1
        free = f"{stem}-{number}"
    used_names.add(free.lower())
    return free


def _as_array(heat: Map) -> np.ndarray:
    return heat.values.float().cpu().numpy()


def _write_json(path: Path, data: dict) -> None:
    # facts of the caller may hold anything, such as paths: str() of what JSON cannot express
    text = json.dumps(data, indent=1, ensure_ascii=False, default=str)
    path.write_text(text + "\n", encoding="utf-8")


def _item(
    name: str,
    label: str,
    heat: Map,
    scale: Scale,
) -> dict:
    """Return what index.json says of one image."""
    lattice = heat.lattice
    item = {
        "name": name,
        "picture": f"{name}.png",
        "map": f"{name}.npz",
        "label": label,
        "shape": list(heat.values.shape),
        "lattice": lattice if lattice is None else lattice._asdict(),
        "min": float(heat.values.min()),
        "max": float(heat.values.max()),
        "vmin": scale.low,
        "vmax": scale.high,
        "target": _plain(heat.target),
        "prefix_mass": _plain(heat.prefix_mass),
    }
    for key, note in heat.notes.items():
        item[f"notes: {key}"] = _plain(note)
    return item


def _plain(value):
    """Return what JSON can hold; of flags, such as outlier patches, the indices of those set."""
    if not isinstance(value, Tensor):
        return value
    if value.dtype == torch.bool and value.ndim:
        # (h, w) -> [[y, x], ...]
        return value.nonzero().tolist()
    return value.tolist()
