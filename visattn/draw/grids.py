"""Grids: heads by layers, methods side by side, and the gates of channels and branches as bars."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image, ImageDraw
from torch import Tensor

from visattn.draw.overlay import overlay
from visattn.draw.picture import FAINT, INK, PAPER, beside, enlarged, fitted, font, to_pil
from visattn.draw.scale import Scale, color_bar, one_map, scale_of, to_bytes
from visattn.map import Map

_GAP, _TEXT = 4, 12


def heads_by_layers(
    image,
    maps,
    *,
    index: int = 0,
    query="auto",
    layers: Sequence[int | str] | None = None,
    colormap: str = "inferno",
    vmin: float | None = None,
    vmax: float | None = None,
    share: str = "layer",
    tile: int = 96,
) -> Image.Image:
    """Draw every head (columns) of every layer of tokens (rows) for one image.

    Args:
        image: The image as the model saw it; drawn in the corner.
        maps: What `capture` recorded.
        index: Which image of the batch it is.
        query: As in ``maps.map``: what token is asked.
        layers: Names or numbers of layers; None takes all token layers that lie on a grid.
        colormap, vmin, vmax: As for `overlay`.
        share: "layer" gives the heads of a layer one scale, with a bar at the end of their row;
            "all" gives one to all.
        tile: Width of one map in pixels.
    """
    records = (
        [record for record in maps.tokens if record.grid]
        if layers is None
        else [maps.layer(x) for x in layers]
    )
    if not records:
        raise ValueError("maps must hold a layer of tokens that lie on a grid")
    rows = [
        [maps.map(record.name, head, query)[index] for head in range(record.heads)]
        for record in records
    ]
    if share not in ("layer", "all"):
        raise ValueError(f"share must be 'layer' or 'all', got {share!r}")
    shared = [
        row if share == "layer" else [heat for other in rows for heat in other] for row in rows
    ]
    scales = [scale_of([heat.values for heat in row], colormap, vmin, vmax) for row in shared]
    tiles = [
        [_tile(one_map(heat), scale, tile) for heat in row]
        for row, scale in zip(rows, scales, strict=True)
    ]
    heads = [f"head {head}" for head in range(max(map(len, rows)))]
    if share == "layer":
        tiles = [
            [*row, color_bar(scale, row[0].height)]
            for row, scale in zip(tiles, scales, strict=True)
        ]
    sheet = _table(tiles, [record.name for record in records], heads)
    photo = to_pil(image)
    photo.thumbnail((2 * tile, 2 * tile))
    bar = [color_bar(scales[0], min(sheet.height, 420))] if share == "all" else []
    return beside([photo, sheet, *bar], gap=2 * _GAP)


def methods_by_images(
    images: Sequence,
    heats: Mapping[str, Map],
    *,
    labels: Sequence[str] | None = None,
    colormap: str = "inferno",
    alpha: float = 0.6,
    tile: int = 224,
) -> Image.Image:
    """Draw photographs (rows) and the maps of several methods (columns).

    The values of two methods mean different things: each column has its own scale and bar.
    """
    for name, heat in heats.items():
        if len(heat) != len(images):
            raise ValueError(
                f"heats[{name!r}] must be as many as the images, got {len(heat)} and {len(images)}"
            )
    photos = [_fit(enlarged(to_pil(image), tile), tile) for image in images]
    columns = [_column("", photos, None)]
    for name, heat in heats.items():
        scale = scale_of([heat.values], colormap)
        limits = {"vmin": scale.low, "vmax": scale.high} if scale.low < scale.high else {}
        drawn = [
            overlay(photo, heat[i], colormap=colormap, alpha=alpha, **limits)
            for i, photo in enumerate(photos)
        ]
        columns.append(_column(name, drawn, scale))
    sheet = beside(columns, gap=2 * _GAP)
    return sheet if labels is None else _labeled(sheet, photos, labels)


def gate_bars(gates: Mapping[str, Tensor], *, width: int = 640) -> Image.Image:
    """Draw the gates of channels (C, 1, 1) or branches (K, C, 1, 1) of one image from 0 up.

    Each layer has a panel.

    Args:
        gates: Name of the layer to its gate: ``{r.name: r.alpha[0] for r in maps.layers if r.kind
            == "channel"}``.
        width: Width of the picture in pixels.
    """
    if not gates:
        raise ValueError("gates must name at least one layer")
    figure = Figure(figsize=(width / 100, 1.4 * len(gates) + 0.3), dpi=100, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    for axis, (name, gate) in zip(
        figure.subplots(len(gates), 1, squeeze=False)[:, 0], gates.items(), strict=True
    ):
        values = gate.detach().float().cpu().flatten(-3).numpy()
        branches = values if values.ndim == 2 else values[None]
        for branch, line in enumerate(branches):
            axis.stairs(line, lw=1, fill=len(branches) == 1, label=f"branch {branch}")
        axis.set(
            xlim=(0, branches.shape[1]),
            ylim=(min(0, values.min()), max(1, values.max())),
            ylabel="gate",
        )
        axis.set_title(f"{name}: {branches.shape[1]} channels", fontsize=9, loc="left")
        if len(branches) > 1:
            axis.legend(fontsize=7)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3].copy())


def _tile(values: np.ndarray, scale: Scale, width: int) -> Image.Image:
    height = max(1, round(width * values.shape[0] / values.shape[1]))
    return Image.fromarray(to_bytes(scale.colors(values))).resize(
        (width, height), Image.Resampling.NEAREST
    )


def _table(
    tiles: list[list[Image.Image]], rows: Sequence[str], columns: Sequence[str]
) -> Image.Image:
    """Paste tiles in rows with names at the left and above."""
    left = 2 * _GAP + int(max(font(_TEXT).getlength(name) for name in rows))
    width, top = tiles[0][0].width + _GAP, _TEXT + 2 * _GAP
    heights = [row[0].height + _GAP for row in tiles]
    right = left + max(sum(picture.width + _GAP for picture in row) for row in tiles)
    sheet = Image.new("RGB", (right, top + sum(heights)), PAPER)
    pen = ImageDraw.Draw(sheet)
    for column, name in enumerate(columns):
        pen.text((left + column * width, _GAP), name, FAINT, font(_TEXT))
    y = top
    for name, row, height in zip(rows, tiles, heights, strict=True):
        pen.text((_GAP, y + height // 2), name, INK, font(_TEXT), anchor="lm")
        for column, picture in enumerate(row):
            sheet.paste(picture, (left + column * width, y))
        y += height
    return sheet


def _fit(photo: Image.Image, width: int) -> Image.Image:
    return photo.resize(
        (width, max(1, round(width * photo.height / photo.width))), Image.Resampling.BICUBIC
    )


def _column(name: str, pictures: Sequence[Image.Image], scale: Scale | None) -> Image.Image:
    top = _TEXT + 2 * _GAP
    height = top + sum(picture.height + _GAP for picture in pictures)
    sheet = Image.new("RGB", (pictures[0].width, height), PAPER)
    ImageDraw.Draw(sheet).text((0, _GAP), fitted(name, _TEXT, sheet.width), INK, font(_TEXT))
    y = top
    for picture in pictures:
        sheet.paste(picture, (0, y))
        y += picture.height + _GAP
    if scale is None:
        return sheet
    bar = color_bar(scale, pictures[0].height)
    wide = Image.new("RGB", (sheet.width + bar.width, height), PAPER)
    wide.paste(sheet)
    wide.paste(bar, (sheet.width, top))
    return wide


def _labeled(
    sheet: Image.Image, photos: Sequence[Image.Image], labels: Sequence[str]
) -> Image.Image:
    """Write a line over the lower edge of each photograph in the first column."""
    pen, y = ImageDraw.Draw(sheet), _TEXT + 2 * _GAP
    for photo, label in zip(photos, labels, strict=True):
        y += photo.height + _GAP
        line = fitted(label, _TEXT, photo.width - 2 * _GAP)
        box = pen.textbbox((_GAP, y - _GAP - _TEXT - 6), line, font(_TEXT))
        pen.rectangle((box[0] - 3, box[1] - 3, box[2] + 3, box[3] + 3), PAPER)
        pen.text((_GAP, y - _GAP - _TEXT - 6), line, INK, font(_TEXT))
    return sheet
