"""Grids and bars: the right map stands in the right place, in the color of its value."""

import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image

from visattn.draw.grids import gate_bars, heads_by_layers, methods_by_images
from visattn.map import Map
from visattn.models.presets import create_model
from visattn.record import capture

PHOTO = Image.new("RGB", (48, 32), "teal")


@pytest.fixture(scope="module")
def maps():
    torch.manual_seed(0)
    model = create_model("vit_nano", num_classes=3, image_size=(32, 48), depth=2).eval()
    with torch.no_grad(), capture(model) as captured:
        model(torch.rand(2, 3, 32, 48))
    return captured


def colors(values, low, high):
    unit = np.clip((values - low) / (high - low), 0, 1)
    return np.floor(np.asarray(matplotlib.colormaps["inferno"](unit))[..., :3] * 255 + 0.5)


def find(sheet, tile):
    """Return left and top of every place where a picture stands on a sheet."""
    sheet = np.asarray(sheet)
    height, width, _ = tile.shape
    last_y = sheet.shape[0] - height
    last_x = sheet.shape[1] - width
    starts = (sheet[: last_y + 1, : last_x + 1] == tile[0, 0]).all(-1)
    places = []
    for y, x in np.argwhere(starts):
        if np.array_equal(sheet[y : y + height, x : x + width], tile):
            places.append((x, y))
    return places


@pytest.mark.parametrize("share", ["layer", "all"])
def test_every_head_of_every_layer_stands_in_its_place(maps, share):
    sheet = heads_by_layers(PHOTO, maps, index=1, share=share, tile=12)
    heats = [[maps.map(layer, head).values[1].numpy() for head in range(4)] for layer in (0, 1)]
    whole = np.array(heats)
    places = []
    for row, layer in enumerate(heats):
        sharing = whole[row] if share == "layer" else whole
        for heat in layer:
            tile = colors(heat, sharing.min(), sharing.max()).repeat(2, 0).repeat(2, 1)
            (place,) = find(sheet, tile)
            places.append(place)
    columns = sorted({x for x, _ in places})
    rows = sorted({y for _, y in places})
    assert (len(rows), len(columns)) == (2, 4)
    assert places == [(x, y) for y in rows for x in columns]


def test_layers_and_query_can_be_chosen(maps):
    name = maps.layers[1].name
    sheet = heads_by_layers(PHOTO, maps, layers=[name], query=(0, 1), tile=12)
    heats = np.stack([maps.map(name, head, (0, 1)).values[0].numpy() for head in range(4)])
    tile = colors(heats[2], heats.min(), heats.max()).repeat(2, 0).repeat(2, 1)
    assert len(find(sheet, tile)) == 1
    with pytest.raises(ValueError, match="share must be"):
        heads_by_layers(PHOTO, maps, share="head")


def test_methods_share_a_scale_in_their_column_only():
    first = Map(torch.stack([torch.full((2, 3), 1.0), torch.full((2, 3), 3.0)]))
    second = Map(torch.stack([torch.full((2, 3), 100.0), torch.full((2, 3), 300.0)]))
    black = [Image.new("RGB", (48, 32))] * 2
    sheet = methods_by_images(
        black, {"a": first, "b": second}, alpha=1.0, tile=48, labels=["one", "two"]
    )
    lows = find(sheet, colors(np.zeros((32, 48)), 0, 1))
    highs = find(sheet, colors(np.ones((32, 48)), 0, 1))
    assert len(lows) == len(highs) == 2
    assert [x for x, _ in lows] == [x for x, _ in highs]
    assert lows[0][1] < highs[0][1]
    message = r"heats\['a'\] must be as many as the images, got 2 and 1"
    with pytest.raises(ValueError, match=message):
        methods_by_images(black[:1], {"a": first})


def count_ink(picture):
    """Count the pixels that are not white."""
    return (np.asarray(picture) < 250).any(-1).sum()


def test_gates_become_bars():
    gates = {"layer1.se": torch.rand(16, 1, 1), "layer2.sk": torch.rand(2, 8, 1, 1)}
    picture = gate_bars(gates, width=400)
    one_panel = gate_bars({"layer1.se": gates["layer1.se"]}, width=400)
    assert picture.width == one_panel.width == 400
    assert picture.height > one_panel.height
    closed_ink = count_ink(gate_bars({"se": torch.zeros(4, 1, 1)}))
    open_ink = count_ink(gate_bars({"se": torch.ones(4, 1, 1)}))
    assert open_ink > 4 * closed_ink, "an open gate draws full bars"
    with pytest.raises(ValueError, match="at least one layer"):
        gate_bars({})
