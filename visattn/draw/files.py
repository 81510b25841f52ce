"""Save: the maps of many images as pictures, numbers and an index."""

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from visattn.draw.overlay import overlay
from visattn.draw.picture import beside, enlarged, to_pil, with_caption
from visattn.draw.scale import Scale, color_bar, scale_of, values_of
from visattn.map import Map

_MISSING = object()


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
    """Write for each image NAME.png (overlay, scale bar, label), NAME.npz (the raw map), and one index.json.

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
        facts: What else index.json should say of each image.
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
    values = values_of(heat)
    heat = heat if values.ndim == 3 else replace(heat, values=heat.values[None])
    _check_counts(len(heat), images=images, names=names, labels=labels, facts=facts)
    colors = "gray" if blend == "mask" else colormap
    shared = scale_of([heat], colors, vmin, vmax)
    folder = writable(Path(folder))
    used, items = set(), []
    for index, image in enumerate(_exactly(images, len(heat))):
        name = _free_name(names[index] if names else _stem(image, index), used)
        label = labels[index] if labels else ""
        one = heat[index]
        scale = scale_of([one.values], colors, vmin, vmax) if own_scale else shared
        picture(one, image, label, scale, colormap=colormap, alpha=alpha, blend=blend).save(
            folder / f"{name}.png"
        )
        np.savez_compressed(folder / f"{name}.npz", values=one.values.float().cpu().numpy())
        items.append(_item(name, label, one, scale) | (facts[index] if facts else {}))
    about = {
        "method": heat.method,
        "layer": heat.layer,
        "colormap": colors,
        "blend": blend,
        "own_scale": own_scale,
    }
    text = json.dumps({**about, "images": items}, indent=1, ensure_ascii=False, default=str)
    (folder / "index.json").write_text(text + "\n", encoding="utf-8")
    return items


def picture(heat: Map, image, label: str, scale: Scale, *, colormap: str, alpha: float, blend: str):
    """Return the PIL picture of one map: overlay, scale bar, and below them the label and what map it is."""
    photo = enlarged(to_pil(image))
    limits = {"vmin": scale.low, "vmax": scale.high} if scale.low < scale.high else {}
    drawn = overlay(
        photo, replace(heat, limits=None), colormap=colormap, alpha=alpha, blend=blend, **limits
    )
    target = "" if heat.target is None else f"target {_plain(heat.target)}"
    mass = "" if heat.prefix_mass is None else f"{float(heat.prefix_mass):.0%} on prefix tokens"
    detail = ", ".join(part for part in (heat.method, target, mass, heat.layer) if part)
    return with_caption(beside([drawn, color_bar(scale, drawn.height)]), label, detail)


def _check_counts(count: int, **given) -> None:
    for name, entries in given.items():
        if hasattr(entries, "__len__") and len(entries) != count:
            raise ValueError(
                f"{name} must be as many as the maps: got {len(entries)} {name} and {count} maps"
            )


def _exactly(images: Iterable, count: int):
    """Yield the images, and complain if they are not as many as the maps."""
    if isinstance(images, (str, Path)) or (
        isinstance(images, (np.ndarray, Tensor)) and images.ndim < 4
    ):
        raise ValueError(
            "images must be a list or batch with one image per map, got a single image: wrap it in a list"
        )
    for index, (image, expected) in enumerate(
        zip_longest(images, range(count), fillvalue=_MISSING)
    ):
        if image is _MISSING or expected is _MISSING:
            raise ValueError(
                f"images must be as many as the maps: got {'only ' * (image is _MISSING)}{index} images"
                f"{'' if image is _MISSING else ' and more'} and {count} maps"
            )
        yield image


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
    return Path(image).stem if isinstance(image, (str, Path)) else f"{index:04d}"


def _free_name(name: str, used: set[str]) -> str:
    """Return a file name that every file system takes and no other image has."""
    safe = re.sub(r"[^\w.+-]+", "_", Path(name).name).strip("._")[:120] or "image"
    number, free = 1, safe
    while free.lower() in used:
        number += 1
        free = f"{safe}-{number}"
    used.add(free.lower())
    return free


def _item(name: str, label: str, heat: Map, scale: Scale) -> dict:
    plain = {key: _plain(getattr(heat, key)) for key in ("target", "prefix_mass")}
    low, high = float(heat.values.min()), float(heat.values.max())
    files = {"name": name, "picture": f"{name}.png", "map": f"{name}.npz"}
    notes = {f"notes: {key}": _plain(value) for key, value in heat.notes.items()}
    place = {
        "shape": list(heat.values.shape),
        "lattice": None if heat.lattice is None else heat.lattice._asdict(),
    }
    values = {"min": low, "max": high, "vmin": scale.low, "vmax": scale.high}
    return {**files, "label": label, **place, **values, **plain, **notes}


def _plain(value):
    """Return what JSON can hold; of flags, such as those of outlier patches, the places where they are set."""
    if isinstance(value, Tensor) and value.dtype == torch.bool and value.ndim:
        return value.nonzero().tolist()
    return value.tolist() if isinstance(value, Tensor) else value
