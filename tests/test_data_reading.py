"""Data: how odd and broken files are read, resized and normalized."""

import logging
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from data_cases import (
    BROKEN,
    CLASSES,
    COUNTS,
    ODD,
    assert_same,
    batches,
    image_data,
    make_split,
    make_tree,
    make_zip,
    picture,
)
from PIL import Image

from visattn.data import decode
from visattn.data.cached_images import CachedImages
from visattn.data.images import list_classes
from visattn.data.transform import EvalTransform, build_transform


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    return make_tree(tmp_path_factory.mktemp("data") / "photos")


@pytest.mark.parametrize("name", ODD)
@pytest.mark.parametrize("size", [(7, 7), (14, 14)])
def test_odd_images(tmp_path, name, size):
    data, first, last = ODD[name]
    for split in CLASSES:
        (tmp_path / split).mkdir()
        (tmp_path / split / name).write_bytes(data)
        (tmp_path / split / f"2{name}").write_bytes(data)
    images, _ = next(iter(image_data(tmp_path, image_size=size, on_error="raise").val_dataloader()))
    pixels = ((images[0] * 0.25 + 0.5) * 255).permute(1, 2, 0)
    corner = size[0] // 7  # away from the outermost pixels and from the border of the halves
    assert (pixels[corner, corner] - torch.tensor(first)).abs().max() < 3
    assert (pixels[-1 - corner, -1 - corner] - torch.tensor(last)).abs().max() < 3
    with Image.open(
        tmp_path / "ant" / name
    ) as image:  # as a user of the classifier would hand it in
        transform = build_transform(
            {"image_size": list(size), "resize": "cover", "mean": [0.5] * 3, "std": [0.25] * 3}
        )
        torch.testing.assert_close(transform(image), images[0])


def test_kept_images_are_those_of_the_files(tmp_path):
    for name in CLASSES:
        (tmp_path / name).mkdir()
        for odd, (data, _, _) in ODD.items():
            (tmp_path / name / odd).write_bytes(data)
        picture(1, (203, 131)).save(tmp_path / name / "large.jpg")  # decoded no finer than needed
        (tmp_path / name / "broken.png").write_bytes(b"")
    plain, kept = (
        image_data(tmp_path, cache=cache, augment="strong", val_fraction=0.4)
        for cache in (False, True)
    )
    expected = [*batches(plain.train_dataloader()), *batches(plain.val_dataloader())]
    for path in tmp_path.rglob("*.*"):
        path.unlink()
    assert_same([*batches(kept.train_dataloader()), *batches(kept.val_dataloader())], expected)
    assert (
        {Path(name).name for name in kept.skipped}
        == {Path(name).name for name in plain.skipped}
        == {"broken.png"}
    )


def test_more_pixels_than_the_memory_may_take_are_refused(tree):
    source = list_classes(tree)["train"]
    kept = CachedImages(source, range(4), 22, max_bytes=4 * 19 * 13 * 3)
    assert len(kept) == len(source) and kept.name(3) == source.name(3)
    with pytest.raises(
        ValueError, match=r"cache: 5 of 6 images take more than 0\.0 GiB: turn it off"
    ):
        CachedImages(source, range(6), 22, max_bytes=4 * 19 * 13 * 3)


@pytest.mark.parametrize("workers", [0, 2])
def test_broken_files_are_left_out_and_listed(tmp_path, workers, caplog):
    make_split(tmp_path / "train", COUNTS["train"])
    make_split(tmp_path / "val", COUNTS["val"])
    for split in ("train", "val"):
        for name, (data, _) in BROKEN.items():
            (tmp_path / split / "bee" / name).write_bytes(data)
        (tmp_path / split / "bee" / "notes.txt").write_text("not a picture")
    data = image_data(tmp_path, num_workers=workers, batch_size=3)
    seen = batches(data.val_dataloader())
    assert Counter(label for _, labels in seen for label in labels) == dict(
        enumerate(COUNTS["val"])
    )
    assert all(len(labels) for _, labels in seen)
    trained = batches(data.train_dataloader())
    assert {len(labels) for _, labels in trained} == {
        3
    }  # another image takes the place of a broken one
    expected = [
        f"{split}/bee/{name}" for split in ("train", "val") for name in [*BROKEN, "notes.txt"]
    ]
    assert sorted(expected) == data.skipped
    with caplog.at_level(logging.WARNING):
        data.teardown("fit")
    assert "train/bee/bomb.png" in caplog.text and "14 unreadable" in caplog.text


@pytest.mark.parametrize("name", BROKEN)
def test_broken_file_raises_with_its_name(tmp_path, name):
    make_split(tmp_path, (2, 2, 2))
    for number in range(2):
        (tmp_path / "cat" / f"0{number}.png").unlink()
        (tmp_path / "cat" / f"{number}{name}").write_bytes(BROKEN[name][0])
    with pytest.raises(ValueError, match=rf"cannot read image 'cat/\d{name}': .*{BROKEN[name][1]}"):
        list(image_data(tmp_path, on_error="raise").val_dataloader())


def test_broken_file_raises_with_its_name_from_a_worker(tmp_path):
    make_tree(tmp_path / "photos")
    (tmp_path / "photos" / "train" / "cat" / "01.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"train/cat/01\.png"):
        list(image_data(tmp_path / "photos", num_workers=1, on_error="raise").train_dataloader())


def test_a_garbled_file_in_a_zip_is_left_out(tree, tmp_path):
    packed, name = make_zip(tree, tmp_path / "x.zip"), "train/bee/03.png"
    with zipfile.ZipFile(packed) as archive:
        start = archive.getinfo(name).header_offset + 30 + len(name)
    data = bytearray(packed.read_bytes())
    data[start : start + 4] = b"\xff" * 4  # no block that deflate knows
    packed.write_bytes(data)
    data = image_data(packed)
    assert {len(labels) for _, labels in batches(data.train_dataloader())} == {5}
    assert data.skipped == [name]


def test_nothing_readable(tmp_path):
    for name in CLASSES:
        (tmp_path / name).mkdir()
        for number in range(3):
            (tmp_path / name / f"{number}.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"none of 6 images can be read, the first is 'ant/"):
        next(iter(image_data(tmp_path).train_dataloader()))
    with pytest.raises(ValueError, match=r"none of 6 training images can be read, such as"):
        image_data(tmp_path, mean=None, std=None).transform_config()


def test_bomb_handed_to_the_transform(monkeypatch):
    monkeypatch.setattr(decode, "MAX_PIXELS", 19 * 13 - 1)
    with pytest.raises(ValueError, match="19 x 13 pixels are more than 246: save it smaller first"):
        EvalTransform((5, 7))(picture(0))


def test_large_jpeg_is_decoded_coarsely_yet_the_same(tmp_path):
    picture(3, (1500, 1100)).save(tmp_path / "x.jpg", quality=95)
    transform = EvalTransform((56, 64))
    with Image.open(tmp_path / "x.jpg") as image:
        coarse = transform(image)
        assert image.width < 1500  # decoded at a fraction of its size
    with Image.open(tmp_path / "x.jpg") as image:
        torch.testing.assert_close(coarse, transform(image.copy()), rtol=0, atol=0.03)


# transforms


def test_cover_keeps_the_middle_and_stretch_everything():
    image = Image.new("RGB", (300, 100), "black")
    image.paste("white", (100, 0, 200, 100))
    assert EvalTransform((10, 10)).pixels(image).min() > 220
    stretched = EvalTransform((10, 30), resize="stretch").pixels(image)
    assert (
        stretched[:, :9].max() < 15
        and stretched[:, 11:19].min() > 240
        and stretched[:, 21:].max() < 15
    )


@pytest.mark.parametrize("missing", ["mean", "image_size"])
def test_build_transform_refuses_other_keys(tree, missing):
    config = image_data(tree).transform_config()
    config.pop(missing)
    with pytest.raises(ValueError, match="must have exactly the keys"):
        build_transform(config)


def test_mean_and_std_are_those_of_the_training_images(tree):
    config = image_data(tree, mean=None, std=None).transform_config()
    values = [np.asarray(Image.open(path)) for path in tree.glob("train/*/[0-9]*.png")]
    resized = [EvalTransform((11, 17)).pixels(Image.fromarray(value)) / 255 for value in values]
    np.testing.assert_allclose(config["mean"], np.mean(resized, (0, 1, 2)), atol=1e-5)
    np.testing.assert_allclose(config["std"], np.std(resized, (0, 1, 2)), atol=1e-5)
    assert config == image_data(tree, mean=None, std=None).transform_config()


def test_one_color_does_not_divide_by_zero(tmp_path):
    for name in CLASSES:
        (tmp_path / name).mkdir()
        for number in range(2):
            Image.new("RGB", (5, 5), "gray").save(tmp_path / name / f"{number}.png")
    images, _ = next(iter(image_data(tmp_path, mean=None, std=None).val_dataloader()))
    assert images.abs().max() < 0.01
