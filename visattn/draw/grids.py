"""Grids: heads by layers, methods side by side, and the gates of channels and branches as bars."""

from collections.abc import Mapping, Sequence
from itertools import chain

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image, ImageDraw
from torch import Tensor

from visattn.draw.overlay import overlay
from visattn.draw.picture import (
    FAINT,
    INK,
    PAPER,
    beside,
    blank_sheet,
    enlarged,
    fitted,
    font,
    to_bytes,
    to_pil,
)
from visattn.draw.scale import Scale, color_bar, one_map, scale_of
from visattn.map import Map
from visattn.record.entry import Record
from visattn.record.session import Maps

_GAP = 4  # pixels between pictures
_TEXT = 12  # pixels: the size of names
_HEADING = _TEXT + 2 * _GAP  # pixels above the first row
_BAR_HEIGHT_LIMIT = 420  # pixels
_SHARES = ("layer", "all")


def heads_by_layers(
    image,
    maps: Maps,
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
        query: The token whose attention is drawn, as in ``maps.map``.
        layers: Names or numbers of layers; None takes all token layers that lie on a grid.
        colormap, vmin, vmax: As for `overlay`.
        share: "layer" gives the heads of a layer one scale, with a bar at the end of their row;
            "all" gives one to all.
        tile: Width of one map in pixels.
    """
    if share not in _SHARES:
        raise ValueError(f"share must be 'layer' or 'all', got {share!r}")
    records = _select_layers(maps, layers)
    rows = [_maps_of_heads(maps, record, query, index) for record in records]
    scales = _scales_of_rows(rows, share, colormap, vmin, vmax)
    tiles = []
    for heats, scale in zip(rows, scales, strict=True):
        tile_row = [_draw_tile(one_map(heat), scale, tile) for heat in heats]
        if share == "layer":
            tile_row.append(color_bar(scale, tile_row[0].height))
        tiles.append(tile_row)
    row_names = [record.name for record in records]
    most_heads = max(len(heats) for heats in rows)
    column_names = [f"head {head}" for head in range(most_heads)]
    photo = to_pil(image)
    photo.thumbnail((2 * tile, 2 * tile))
    panels = [photo, _draw_table(tiles, row_names, column_names)]
    if share == "all":
        bar_height = min(panels[1].height, _BAR_HEIGHT_LIMIT)
        panels.append(color_bar(scales[0], bar_height))
    return beside(panels, gap=2 * _GAP)


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
    photos = []
    for image in images:
        photo = enlarged(to_pil(image), tile)
        photos.append(_resize_to_width(photo, tile))
    columns = [_draw_column("", photos)]
    for name, heat in heats.items():
        scale = scale_of([heat.values], colormap)
        pictures = []
        for i, photo in enumerate(photos):
            pictures.append(_overlay_on_scale(photo, heat[i], scale, alpha))
        columns.append(_draw_column(name, pictures, scale))
    sheet = beside(columns, gap=2 * _GAP)
    if labels is not None:
        _write_labels(sheet, photos, labels)
    return sheet


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
    inches = (width / 100, 1.4 * len(gates) + 0.3)
    figure = Figure(figsize=inches, dpi=100, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    panels = figure.subplots(len(gates), 1, squeeze=False)
    for panel, name in zip(panels[:, 0], gates, strict=True):
        _draw_gate(panel, name, gates[name])
    canvas.draw()
    rgba = np.asarray(canvas.buffer_rgba())
    return Image.fromarray(rgba[..., :3].copy())


def _select_layers(maps: Maps, layers: Sequence[int | str] | None) -> list[Record]:
    if layers is None:
        records = [record for record in maps.tokens if record.grid]
    else:
        records = [maps.layer(layer) for layer in layers]
    if not records:
        raise ValueError("maps must hold a layer of tokens that lie on a grid")
    return records


def _maps_of_heads(
    maps: Maps,
    record: Record,
    query,
    index: int,
) -> list[Map]:
    """Return the map of each head of a layer for one image of the batch."""
    heats = []
    for head in range(record.heads):
        heat = maps.map(record.name, head, query)
        heats.append(heat[index])
    return heats


def _scales_of_rows(
    rows: list[list[Map]],
    share: str,
    colormap: str,
    vmin: float | None,
    vmax: float | None,
) -> list[Scale]:
    """Return one scale per row; with ``share="all"`` they are equal."""
    # the values alone: a map picked from a batch would bring the limits of that batch
    values = [[heat.values for heat in heats] for heats in rows]
    if share == "all":
        all_values = list(chain.from_iterable(values))
        return [scale_of(all_values, colormap, vmin, vmax)] * len(rows)
    return [scale_of(row_values, colormap, vmin, vmax) for row_values in values]


def _draw_tile(
    values: np.ndarray,
    scale: Scale,
    width: int,
) -> Image.Image:
    """Draw a map (h, w) in squares of one color per patch."""
    rows, columns = values.shape
    height = round(width * rows / columns)
    small = Image.fromarray(to_bytes(scale.colors(values)))
    size = (width, max(1, height))
    return small.resize(size, Image.Resampling.NEAREST)


def _draw_table(
    tiles: list[list[Image.Image]],
    row_names: Sequence[str],
    column_names: Sequence[str],
) -> Image.Image:
    """Paste tiles in rows, with names at the left and above."""
    name_width = max(font(_TEXT).getlength(name) for name in row_names)
    left = 2 * _GAP + int(name_width)
    column_width = tiles[0][0].width + _GAP
    row_heights = [tile_row[0].height + _GAP for tile_row in tiles]
    row_widths = [sum(tile.width + _GAP for tile in tile_row) for tile_row in tiles]
    sheet = blank_sheet(left + max(row_widths), _HEADING + sum(row_heights))
    pen = ImageDraw.Draw(sheet)
    for column, name in enumerate(column_names):
        corner = (left + column * column_width, _GAP)
        pen.text(corner, name, FAINT, font(_TEXT))
    y = _HEADING
    for name, tile_row, height in zip(row_names, tiles, row_heights, strict=True):
        middle_left = (_GAP, y + height // 2)
        pen.text(middle_left, name, INK, font(_TEXT), anchor="lm")
        for column, tile in enumerate(tile_row):
            sheet.paste(tile, (left + column * column_width, y))
        y += height
    return sheet


def _resize_to_width(photo: Image.Image, width: int) -> Image.Image:
    height = round(width * photo.height / photo.width)
    size = (width, max(1, height))
    return photo.resize(size, Image.Resampling.BICUBIC)


def _overlay_on_scale(
    photo: Image.Image,
    heat: Map,
    scale: Scale,
    alpha: float,
) -> Image.Image:
    if scale.low >= scale.high:
        # a map of one value has no range to draw on
        return overlay(photo, heat, colormap=scale.colormap, alpha=alpha)
    return overlay(
        photo,
        heat,
        colormap=scale.colormap,
        alpha=alpha,
        vmin=scale.low,
        vmax=scale.high,
    )


def _draw_column(
    name: str,
    pictures: Sequence[Image.Image],
    scale: Scale | None = None,
) -> Image.Image:
    """Paste pictures one below the other under a name, with the bar of their scale."""
    height = _HEADING + sum(picture.height + _GAP for picture in pictures)
    column = blank_sheet(pictures[0].width, height)
    pen = ImageDraw.Draw(column)
    heading = fitted(name, _TEXT, column.width)
    pen.text((0, _GAP), heading, INK, font(_TEXT))
    y = _HEADING
    for picture in pictures:
        column.paste(picture, (0, y))
        y += picture.height + _GAP
    if scale is None:
        return column
    bar = color_bar(scale, pictures[0].height)
    wider = blank_sheet(column.width + bar.width, height)
    wider.paste(column)
    wider.paste(bar, (column.width, _HEADING))
    return wider


def _write_labels(
    sheet: Image.Image,
    photos: Sequence[Image.Image],
    labels: Sequence[str],
) -> None:
    """Write a line over the lower edge of each photograph in the first column."""
    pen = ImageDraw.Draw(sheet)
    bottom = _HEADING
    for photo, label in zip(photos, labels, strict=True):
        bottom += photo.height + _GAP
        line = fitted(label, _TEXT, photo.width - 2 * _GAP)
        corner = (_GAP, bottom - _GAP - _TEXT - 6)
        x0, y0, x1, y1 = pen.textbbox(corner, line, font(_TEXT))
        frame = (x0 - 3, y0 - 3, x1 + 3, y1 + 3)
        pen.rectangle(frame, PAPER)
        pen.text(corner, line, INK, font(_TEXT))


def _draw_gate(
    panel: Axes,
    name: str,
    gate: Tensor,
) -> None:
    """Draw the gate of one layer: a filled outline, or one line per branch."""
    values = gate.detach().float().cpu()
    branches = values.flatten(-3).numpy()  # (C, 1, 1) -> (C,), (K, C, 1, 1) -> (K, C)
    if branches.ndim == 1:
        branches = branches[None]
    is_single = len(branches) == 1
    channels = branches.shape[1]
    for branch, line in enumerate(branches):
        panel.stairs(line, lw=1, fill=is_single, label=f"branch {branch}")
    lowest = min(0, branches.min())
    highest = max(1, branches.max())
    panel.set_xlim(0, channels)
    panel.set_ylim(lowest, highest)
    panel.set_ylabel("gate")
    panel.set_title(f"{name}: {channels} channels", fontsize=9, loc="left")
    if not is_single:
        panel.legend(fontsize=7)
