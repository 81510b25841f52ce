"""Overlay and save: exact pixels on tiny images, every type of image, one scale, refusals."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from visattn.draw.files import save_maps
from visattn.draw.overlay import overlay
from visattn.draw.picture import fitted, font, to_rgb
from visattn.draw.scale import Scale, color_bar
from visattn.map import Map

HEAT = torch.tensor([[0.0, 0.25, 1.0], [0.5, 0.75, 2.0]])
PHOTO = np.array(
    [[[0, 100, 200], [10, 20, 30], [255, 255, 255]], [[1, 2, 3], [90, 80, 70], [0, 0, 0]]], np.uint8
)


def test_alpha_blend_is_exact():
    """The colormap gray maps 0, 0.5 and 1 to 0, 128 and 255; values beyond vmax are cut."""
    out = overlay(PHOTO, HEAT, colormap="gray", alpha=0.4, vmin=0, vmax=1)
    gray = np.array([[0, 64, 255], [128, 192, 255]])[..., None]
    assert np.array_equal(out, np.floor(0.6 * PHOTO + 0.4 * gray + 0.5))


@pytest.mark.parametrize(("alpha", "expected"), [(0.0, PHOTO), (1.0, np.full_like(PHOTO, 255))])
def test_alpha_ends(alpha, expected):
    assert np.array_equal(
        overlay(PHOTO, torch.ones(2, 3), colormap="gray", alpha=alpha, vmin=0, vmax=1), expected
    )


def test_mask_darkens_what_the_map_leaves_out():
    out = overlay(PHOTO, HEAT, blend="mask", alpha=1.0, vmin=0, vmax=1)
    brightness = np.array([[0, 0.25, 1], [0.5, 0.75, 1]])[..., None]
    assert np.array_equal(out, np.floor(brightness * PHOTO + 0.5))


def test_contour_draws_its_lines_and_leaves_the_rest():
    photo = np.full((9, 11, 3), 40, np.uint8)
    heat = torch.zeros(9, 11)
    heat[2:7, 3:8] = 1.0
    out = overlay(photo, heat, blend="contour", colormap="gray", alpha=1.0, vmin=0, vmax=1)
    ring = np.zeros((9, 11), bool)
    ring[2:7, 3:8] = True
    ring[3:6, 4:7] = False
    # the three levels coincide here; the last one, 3/4, is drawn on top, and a white line runs
    # inside it
    assert (out[ring] == 192).all()
    assert (out[3, 4:7] == 255).all() and (out[4, 5] == 40).all()
    assert (out[0] == 40).all() and (out[:, 9:] == 40).all()


def test_small_maps_are_interpolated_between_the_centers_of_their_patches():
    out = overlay(
        np.zeros((4, 8), np.uint8),
        torch.tensor([[0.0, 1.0]]),
        colormap="gray",
        alpha=1.0,
        vmin=0,
        vmax=1,
    )
    assert out[0, :, 0].tolist() == [0, 0, 32, 96, 160, 224, 255, 255]


IMAGES = {
    "uint8": PHOTO,
    "float32": PHOTO.astype(np.float32) / 255,
    "float64": PHOTO / 255.0,
    "grey": PHOTO[..., 0],
    "one channel": PHOTO[..., :1],
    "tensor": torch.from_numpy(PHOTO).permute(2, 0, 1),
    "float tensor": torch.from_numpy(PHOTO).permute(2, 0, 1) / 255,
    "bfloat16 tensor": (torch.from_numpy(PHOTO).permute(2, 0, 1) / 255).bfloat16(),
    "grey tensor": torch.from_numpy(PHOTO[..., 0].copy()),
    "PIL": Image.fromarray(PHOTO),
    "PIL grey": Image.fromarray(PHOTO[..., 0].copy()),
    "PIL palette": Image.fromarray(PHOTO).quantize(6),
    "PIL cmyk": Image.fromarray(PHOTO).convert("CMYK"),
}


@pytest.mark.parametrize("name", IMAGES)
def test_same_type_and_size_out(name):
    image = IMAGES[name]
    out = overlay(image, HEAT, alpha=0.0)
    if name.startswith("PIL"):
        assert type(out) is Image.Image
        assert out.mode == "RGB" and out.size == image.size
    else:
        assert type(out) is type(image)
        assert out.dtype == image.dtype
        shape = (3, 2, 3) if isinstance(out, torch.Tensor) else (2, 3, 3)
        assert tuple(out.shape) == shape
    assert np.allclose(to_rgb(out), to_rgb(image), atol=0.5 / 255)


def test_input_is_left_alone():
    photo, heat = PHOTO.copy(), HEAT.clone()
    overlay(photo, heat, blend="contour")
    assert np.array_equal(photo, PHOTO) and torch.equal(heat, HEAT)


def test_transparency_lies_over_white_and_16_bits_keep_their_range():
    clear = Image.new("RGBA", (3, 2), (10, 20, 30, 0))
    assert (to_rgb(clear) == 1).all()
    deep = Image.fromarray(np.full((2, 3), 32896, np.uint16))
    assert np.allclose(to_rgb(deep), 32896 / 65535)


def test_maps_of_one_batch_share_their_scale():
    """The second map has a tenth of the first one's mass: on the same scale it stays dark."""
    heats = Map(torch.stack([HEAT, HEAT / 10]))
    black = np.zeros((2, 3, 3), np.uint8)
    first, second = (overlay(black, heats[i], colormap="gray", alpha=1.0) for i in (0, 1))
    assert first.max() == 255 and second.max() == 25
    alone = overlay(black, HEAT / 10, colormap="gray", alpha=1.0)
    assert alone.max() == 255


def test_scale_bar_stands_beside_and_leaves_the_picture():
    photo = np.zeros((120, 90, 3), np.uint8)
    plain, barred = (overlay(photo, HEAT, scale_bar=bar) for bar in (False, True))
    assert barred.shape[0] == 120 and barred.shape[1] > 90
    assert np.array_equal(barred[:, :90], plain)
    assert overlay(torch.zeros(3, 120, 90), HEAT, scale_bar=True).shape == (3, *barred.shape[:2])


def test_bar_runs_from_the_last_color_to_the_first_and_writes_its_ends():
    bar, other = (np.asarray(color_bar(Scale("gray", 0.0, high), 200)) for high in (0.07, 0.9))
    column = bar[:, 8, 0].astype(int)
    inside = column[6:-6]
    assert inside[0] > 250 and inside[-1] < 5 and (np.diff(inside) <= 0).all()
    assert not np.array_equal(bar[:20, 24:], other[:20, 24 : bar.shape[1]]), (
        "the upper limit is not written"
    )


@pytest.mark.parametrize("height", [1, 5, 13, 31])
def test_bars_of_tiny_pictures(height):
    assert color_bar(Scale("inferno", 0.0, 1.0), height).height == height


def test_constant_maps_take_the_first_color():
    out = overlay(PHOTO, torch.full((2, 3), 0.3), colormap="gray", alpha=1.0)
    assert (out == 0).all()


REFUSALS = {
    "colormap": (PHOTO, HEAT, {"colormap": "infernoo"}, "'inferno'"),
    "blend": (PHOTO, HEAT, {"blend": "maks"}, "did you mean 'mask'"),
    "alpha": (PHOTO, HEAT, {"alpha": 1.5}, "alpha must lie in"),
    "limits": (PHOTO, HEAT, {"vmin": 2, "vmax": 1}, "vmin=2 and vmax=1"),
    "nan": (PHOTO, HEAT / HEAT, {}, "1 NaN or infinite values of 6"),
    "batch of maps": (PHOTO, torch.rand(2, 3, 5), {}, "pass heat\\[i\\]"),
    "map without axes": (PHOTO, torch.rand(3), {}, "got shape \\(3,\\)"),
    "two channels": (PHOTO[..., :2], HEAT, {}, "C of 1, 3 or 4"),
    "channels last tensor": (torch.from_numpy(PHOTO), HEAT, {}, "\\(C, H, W\\)"),
    "normalized": (torch.full((3, 2, 3), -2.1), HEAT, {}, "undo the model's normalization"),
    "integers": (PHOTO.astype(np.int64), HEAT, {}, "got int64"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals_name_what_is_wrong(case):
    image, heat, options, message = REFUSALS[case]
    with pytest.raises(ValueError, match=message):
        overlay(image, heat, **options)


def test_other_things_are_no_images():
    with pytest.raises(TypeError, match="got str"):
        overlay("photo.png", HEAT)


@pytest.fixture
def heats():
    return Map(
        torch.stack([HEAT, HEAT / 10]),
        "blocks.1",
        "raw",
        torch.tensor([4, 2]),
        torch.tensor([0.25, 0.5]),
    )


def test_save_writes_pictures_numbers_and_an_index(tmp_path, heats):
    photos = [Image.new("RGB", (60, 40), color) for color in ("navy", "white")]
    items = save_maps(photos, heats, tmp_path / "deep" / "out", labels=["cat 91 %", "dog 55 %"])
    index = json.loads((tmp_path / "deep/out/index.json").read_text(encoding="utf-8"))
    assert index["images"] == items and [item["picture"] for item in items] == [
        "0000.png",
        "0001.png",
    ]
    assert (index["own_scale"], index["method"], index["layer"]) == (False, "raw", "blocks.1")
    assert [(item["vmin"], item["vmax"]) for item in items] == [(0, 2)] * 2
    assert (
        items[1]["prefix_mass"] == 0.5
        and items[1]["target"] == 2
        and items[1]["label"] == "dog 55 %"
    )
    assert items[1]["max"] == pytest.approx(0.2)
    for i, item in enumerate(items):
        with np.load(tmp_path / "deep/out" / item["map"]) as raw:
            assert np.array_equal(raw["values"], heats.values[i].numpy())
        with Image.open(tmp_path / "deep/out" / item["picture"]) as picture:
            assert min(picture.size) >= 320, "small images are enlarged to be legible"


def test_saved_pictures_share_the_scale_and_carry_their_label(tmp_path, heats):
    black = [Image.new("RGB", (60, 40))] * 2
    save_maps(black, heats, tmp_path / "plain", colormap="gray", alpha=1.0)
    save_maps(
        black,
        heats,
        tmp_path / "labeled",
        colormap="gray",
        alpha=1.0,
        labels=["cat 91 %", "dog 55 %"],
    )
    plain = [np.asarray(Image.open(tmp_path / "plain" / f"000{i}.png")) for i in (0, 1)]
    labeled = [np.asarray(Image.open(tmp_path / "labeled" / f"000{i}.png")) for i in (0, 1)]
    assert plain[0][:320, :480].max() == 255 and plain[1][:320, :480].max() == 25
    assert labeled[0].shape[0] > plain[0].shape[0]
    assert not np.array_equal(labeled[0][320:], labeled[1][320:]), (
        "the labels are not on the pictures"
    )


def test_an_own_scale_is_drawn_only_when_asked_for(tmp_path, heats):
    items = save_maps(
        [Image.new("RGB", (60, 40))] * 2,
        heats,
        tmp_path,
        colormap="gray",
        alpha=1.0,
        own_scale=True,
    )
    assert [item["vmax"] for item in items] == pytest.approx([2, 0.2])
    assert all(
        np.asarray(Image.open(tmp_path / f"000{i}.png"))[:320, :480].max() == 255 for i in (0, 1)
    )


def test_save_takes_paths_generators_and_equal_names(tmp_path, heats):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        Image.new("RGB", (9, 7), "teal").save(tmp_path / folder / "same name.png")
    paths = [tmp_path / "a" / "same name.png", str(tmp_path / "b" / "same name.png")]
    items = save_maps((path for path in paths), heats, tmp_path / "out")
    assert [item["name"] for item in items] == ["same_name", "same_name-2"]
    items = save_maps(
        torch.zeros(2, 3, 9, 7), heats, tmp_path / "tensor", names=["../up", "CON<>|?"]
    )
    assert [item["name"] for item in items] == ["up", "CON"]


def test_one_map_and_one_image(tmp_path, heats):
    items = save_maps([Image.new("L", (9, 7))], heats[1], tmp_path)
    assert len(items) == 1 and items[0]["prefix_mass"] == 0.5


@pytest.mark.parametrize(
    ("images", "options", "message"),
    [
        ([PHOTO], {}, "1 images and 2 maps"),
        ((photo for photo in [PHOTO] * 3), {}, "2 images and more and 2 maps"),
        ((photo for photo in [PHOTO]), {}, "only 1 images and 2 maps"),
        (PHOTO, {}, "wrap it in a list"),
        ([PHOTO] * 2, {"labels": ["one"]}, "1 labels and 2 maps"),
        ([PHOTO] * 2, {"colormap": "nope"}, "colormap"),
    ],
)
def test_save_refuses(tmp_path, heats, images, options, message):
    with pytest.raises(ValueError, match=message):
        save_maps(images, heats, tmp_path, **options)


def test_save_refuses_a_folder_that_is_a_file(tmp_path, heats):
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="is a file"):
        save_maps([PHOTO] * 2, heats, tmp_path / "file")


def test_long_and_foreign_labels_stay_on_the_picture():
    text = fitted("α漢字 " * 60, 12, 200)
    assert text.endswith("…") and font(12).getlength(text) <= 200
    assert fitted("two\nlines", 12, 200) == "two lines"
