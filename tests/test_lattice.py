"""Where patches lie: found from the convolutions before them, and used by whatever draws or measures."""

import numpy as np
import pytest
import timm
import torch
from torch import nn

from visattn import metrics
from visattn.draw.overlay import overlay
from visattn.map import Lattice, Map
from visattn.methods.explain import METHODS, explain
from visattn.models.presets import create_model
from visattn.record import capture

# (kernel, stride, padding, dilation) of each convolution, (kernel, stride, padding) of a pooling,
# or a module.
STEMS = {
    "three of 3 x 3": [(3, 2, 1, 1)] * 3,
    "convolution and pooling, as in a ResNet": [(7, 2, 3, 1), (3, 2, 1)],
    "average pooling": [(3, 1, 1, 1), (2, 2, 0), (3, 2, 1, 1)],
    "overlapping patches": [(7, 4, 3, 1)],
    "dilated": [(3, 2, 2, 2), (3, 2, 1, 1)],
    "padded below and at the right": [nn.ZeroPad2d((0, 4, 0, 6)), (10, 10, 0, 1)],
    "padded unlike on all sides": [(3, 2, 1, 1), nn.ConstantPad2d((3, 0, 1, 2), 0.5), (3, 2, 0, 1)],
    "padded and cropped": [
        nn.ReflectionPad2d((1, 3, 2, 2)),
        (4, 4, 0, 1),
        nn.ZeroPad2d((0, 0, -1, 0)),
        (2, 2, 0, 1),
    ],
    "of two sides": [((3, 5), (2, 4), (1, 0), 1), (3, (2, 1), 1, 1)],
}


class Stemmed(nn.Module):
    """Convolutions of ones, whose receptive field shows in the gradient, and attention behind them."""

    def __init__(self, stem):
        super().__init__()
        layers = []
        for step in stem:
            if isinstance(step, nn.Module):
                layers.append(step)
            elif len(step) == 4:
                kernel, stride, padding, dilation = step
                layers.append(nn.Conv2d(1, 1, kernel, stride, padding, dilation, bias=False))
                nn.init.ones_(layers[-1].weight)
            else:
                layers.append((nn.AvgPool2d if step[0] == 2 else nn.MaxPool2d)(*step))
        self.stem, self.mix = nn.Sequential(*layers), nn.MultiheadAttention(1, 1, batch_first=True)

    def forward(self, images):
        x = self.stem(images).flatten(2).transpose(1, 2)
        return self.mix(x, x, x)[0].mean(1)


@pytest.mark.parametrize("stem", STEMS)
def test_the_lattice_is_where_the_gradient_is(stem):
    """The middle of all pixels that a patch reads, found by changing them, for patches away from the border."""
    torch.manual_seed(0)
    model, images = Stemmed(STEMS[stem]).eval(), torch.rand(1, 1, 64, 96)
    with torch.no_grad(), capture(model) as maps:
        model(images)
        heat = maps.map()
    grid = heat.values.shape[1:]
    pixels = torch.stack(torch.meshgrid(torch.arange(64.0), torch.arange(96.0), indexing="ij"), -1)
    lattice = heat.lattice or Lattice.tiling(grid)
    for place in ((grid[0] // 2, grid[1] // 2), (grid[0] // 2 + 1, grid[1] // 2 - 1)):
        # a maximum hands its gradient to one pixel: a field of ones and a mean of the fields that
        # it chooses from
        reads = torch.zeros(64, 96)
        for seed in range(300 if "ResNet" in stem else 1):
            x = torch.rand(
                1, 1, 64, 96, generator=torch.Generator().manual_seed(seed)
            ).requires_grad_()
            model.stem(x)[0, 0][place].backward()
            reads += x.grad[0, 0].abs()
        read = pixels[reads > 0]
        middle = (read.amin(0) + read.amax(0)) / 2
        expected = torch.tensor(
            [lattice.y + place[0] * lattice.down, lattice.x + place[1] * lattice.right]
        )
        torch.testing.assert_close((middle + 0.5) / torch.tensor([64.0, 96.0]), expected)


def test_patches_that_tile_the_image_need_none():
    models = (
        timm.create_model("vit_tiny_patch16_224", img_size=64, depth=1),
        create_model("vit_tiny_patch16", image_size=(64, 64), depth=1),
        timm.create_model(
            "swin_tiny_patch4_window7_224",
            img_size=64,
            window_size=4,
            depths=(1, 1),
            num_heads=(3, 6),
        ),
    )
    for model in models:
        with torch.no_grad(), capture(model.eval()) as maps:
            model(torch.rand(1, 3, 64, 64))
        assert [record.keys.lattice for record in maps.layers] == [None] * len(maps.layers)


def padding_models():
    """Patches of 16 x 16, with zeros below and at the right where the image has no whole one."""
    return {
        "visattn": create_model("vit_tiny_patch16", image_size=32, depth=1),
        "timm": timm.create_model(
            "vit_tiny_patch16_224",
            img_size=32,
            depth=1,
            dynamic_img_size=True,
            dynamic_img_pad=True,
        ),
    }


@pytest.mark.parametrize("library", ["visattn", "timm"])
def test_an_image_that_is_padded_moves_no_patch(library):
    model, image = padding_models()[library].eval(), torch.rand(1, 3, 40, 72)
    with torch.no_grad(), capture(model) as maps:
        model(image)
    (record,) = maps.layers
    assert record.grid == (3, 5)
    assert maps.map().lattice == pytest.approx(Lattice(8 / 40, 8 / 72, 16 / 40, 16 / 72))
    for row in range(3):
        for column in range(5):
            values, truth = torch.zeros(1, 3, 5), torch.zeros(1, 40, 72, dtype=torch.bool)
            values[0, row, column] = 1
            truth[0, 16 * row : 16 * row + 16, 16 * column : 16 * column + 16] = True
            assert (
                metrics.pointing_game(Map(values, lattice=record.keys.lattice), truth, 0).item()
                == 1
            )


def test_a_padded_image_is_drawn_on_by_the_pixels():
    values = torch.zeros(1, 3, 5)
    values[0, 1, 3] = 1
    heat = Map(values, lattice=_lattice_of(40, 72))
    drawn = overlay(np.zeros((40, 72, 3), np.uint8), heat[0], colormap="gray", alpha=1)[..., 0]
    resized = heat.resize((40, 72)).values[0].numpy()
    for picture in (drawn, resized):
        assert np.argwhere(picture >= picture.max() - 1e-3).mean(0) == pytest.approx(
            (16 + 7.5, 48 + 7.5)
        )


def _lattice_of(height: int, width: int) -> Lattice:
    model = create_model("vit_tiny_patch16", image_size=32, depth=1).eval()
    with torch.no_grad(), capture(model) as maps:
        model(torch.rand(1, 3, height, width))
    return maps.map().lattice


def test_a_lone_bright_pixel_is_found_in_a_padded_image():
    model = nn.Sequential(
        create_model("vit_tiny_patch16", image_size=32, depth=1).patch_embed, nn.ReLU()
    )
    nn.init.ones_(model[0].proj.weight)
    nn.init.zeros_(model[0].proj.bias)
    model = nn.Sequential(*model, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    image, truth = torch.zeros(1, 3, 40, 72), torch.zeros(1, 40, 72, dtype=torch.bool)
    image[:, :, 24, 56] = 1
    truth[:, 24, 56] = True
    assert metrics.pointing_game(explain(model, image, 0, "hirescam"), truth, 2**0.5).item() == 1


@pytest.mark.parametrize("method", [name for name in METHODS if name != "integrated_gradients"])
def test_every_method_says_where_its_patches_lie(method):
    torch.manual_seed(0)
    model = create_model("vit_nano", num_classes=5, image_size=(48, 64), depth=2).eval()
    heat = explain(model, torch.rand(2, 3, 48, 64), 1, method)
    expected = Lattice(0.5 / 48, 0.5 / 64, 8 / 48, 8 / 64)
    assert heat.lattice == pytest.approx(expected) and heat[1].lattice == heat.lattice


def _at(values: np.ndarray, y: float, x: float) -> float:
    """Interpolate by hand; beyond the outermost centers the nearest one counts."""
    y, x = min(max(y, 0), values.shape[0] - 1), min(max(x, 0), values.shape[1] - 1)
    top, left = min(int(y), values.shape[0] - 2), min(int(x), values.shape[1] - 2)
    down, right = y - top, x - left
    above = (1 - right) * values[top, left] + right * values[top, left + 1]
    below = (1 - right) * values[top + 1, left] + right * values[top + 1, left + 1]
    return (1 - down) * above + down * below


def test_resizing_goes_by_the_lattice():
    values = torch.rand(2, 3, 5)
    lattice = Lattice(0.1, 0.05, 0.3, 0.21)
    found = Map(values, lattice=lattice).resize((7, 11))
    assert found.lattice is None and found.values.shape == (2, 7, 11)
    for b in range(2):
        for y in range(7):
            for x in range(11):
                place = ((y + 0.5) / 7 - 0.1) / 0.3, ((x + 0.5) / 11 - 0.05) / 0.21
                assert found.values[b, y, x].item() == pytest.approx(
                    _at(values[b].numpy(), *place), abs=1e-5
                )
    tiled = Map(values, lattice=Lattice.tiling((3, 5))).resize((7, 11)).values
    torch.testing.assert_close(tiled, Map(values).resize((7, 11)).values)
    nearest = Map(values, lattice=lattice).resize((7, 11), "nearest").values
    assert set(nearest.flatten().tolist()) <= set(values.flatten().tolist())


def test_pictures_and_measures_go_by_the_lattice():
    values = torch.zeros(1, 8, 8)
    values[0, 3, 5] = 1
    heat = Map(values, lattice=Lattice(0.5 / 64, 0.5 / 64, 8 / 64, 8 / 64))
    drawn = overlay(np.zeros((64, 64, 3), np.uint8), heat[0], colormap="gray", alpha=1)[..., 0]
    assert np.unravel_index(drawn.argmax(), drawn.shape) == (24, 40)
    truth = torch.zeros(1, 64, 64, dtype=torch.bool)
    truth[0, 24, 40] = True
    assert metrics.pointing_game(heat, truth, 0).item() == 1
    assert (
        metrics.pointing_game(Map(values), truth, 2).item() == 0
    )  # drawn as if tiled it points 3 to 4 pixels off

    class Spot(nn.Module):
        def forward(self, images):
            return torch.stack([images[:, 0, 24, 40] * 0, images[:, 0, 24, 40]], 1)

    spot = Spot()
    gone = metrics.deletion(spot, torch.ones(1, 3, 64, 64), heat, 1, steps=64, return_curve=True)[0]
    assert gone[0] > 0.7 and (gone[1:] == 0.5).all()
    later = metrics.perturbation(
        spot, torch.ones(1, 3, 64, 64), heat, 1, positive=False, return_curve=True
    )
    assert later.min() == 1  # the coldest pixels first: the class stays
