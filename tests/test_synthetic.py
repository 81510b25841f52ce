"""The embedded images, and the set whose truth is known."""

import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from data_cases import HALF, picture, png

from visattn.data.images import list_classes
from visattn.data.module import ImageData
from visattn.data.synthetic import PlacedCharacters

ASSETS = Path(__file__).parents[1] / "assets"


def test_embedded_images():
    with zipfile.ZipFile(ASSETS / "writing_systems.zip") as packed:
        assert "Copyright (c) 2015 Brenden Lake" in packed.read("LICENSE").decode()
        assert {entry.date_time[0] for entry in packed.infolist()} == {1980}
    assert (ASSETS / "writing_systems.zip").stat().st_size < 1_200_000
    found = list_classes(ASSETS / "writing_systems.zip")
    assert found["train"].classes == ["Balinese", "Early_Aramaic", "Greek", "Korean", "Latin"]
    assert {split: len(images) for split, images in found.items()} == {"train": 2176, "val": 544}


def test_packing_gives_the_same_bytes(tmp_path):
    (tmp_path / "images" / "train").mkdir(parents=True)
    (tmp_path / "images" / "LICENSE").write_text("free")
    (tmp_path / "images" / "train" / "x.png").write_bytes(png(picture(0)))
    for target in ("one.zip", "two.zip"):
        command = [
            sys.executable,
            str(ASSETS / "make_writing_systems.py"),
            str(tmp_path / "images"),
            str(tmp_path / target),
        ]
        subprocess.run(command, check=True, capture_output=True)
    assert (tmp_path / "one.zip").read_bytes() == (tmp_path / "two.zip").read_bytes()


@pytest.mark.parametrize("size", [(64, 64), (48, 80), (25, 31)])
def test_placed_characters_show_the_letter_in_its_box(size):
    images = PlacedCharacters("val", image_size=size, length=60, with_truth=True)
    bare = PlacedCharacters("val", image_size=size, length=60)
    for index in range(60):
        image, label, mask = images[index]
        assert (
            image.size == size[::-1]
            and image.mode == "RGB"
            and mask.shape == size
            and label == index % 5
        )
        assert np.asarray(image)[mask.numpy()].min() < 128  # ink inside the box
        top, left, bottom, right = images.box(index)
        assert mask.sum() == (bottom - top) * (right - left) and mask[top:bottom, left:right].all()
        assert bare[index][0].tobytes() == image.tobytes() and bare[index][1] == label
    assert len({images[index][0].tobytes() for index in range(60)}) == 60


def test_only_the_letter_depends_on_the_label():
    images = PlacedCharacters(length=50)
    others = PlacedCharacters(length=50)
    others.labels = (others.labels + 1) % 5
    for index in range(50):
        outside = ~(images.mask(images.box(index)) | others.mask(others.box(index))).numpy()
        one, two = np.asarray(images[index][0]), np.asarray(others[index][0])
        assert (one != two).any() and (one[outside] == two[outside]).all()
        assert (one[outside] < 128).any()  # the others are there


def test_placed_characters_as_a_data_set():
    data = ImageData(
        dataset="synthetic",
        image_size=(25, 31),
        num_workers=0,
        batch_size=100,
        augment="none",
        **HALF,
    )
    data.setup("fit")
    assert (
        data.classes == ["alpha", "theta", "xi", "phi", "omega"] and data.class_counts == [1200] * 5
    )
    images, labels = next(iter(data.val_dataloader()))
    expected = PlacedCharacters("val", image_size=(25, 31))[3]
    pixels = ((images[3] * 0.25 + 0.5) * 255).round().permute(1, 2, 0).numpy().astype(np.uint8)
    assert (pixels == np.asarray(expected[0])).all() and labels[3] == expected[1]
    splits = [
        PlacedCharacters(split, length=5)[0][0].tobytes() for split in ("train", "val", "test")
    ]
    assert len(set(splits)) == 3
    with pytest.raises(ValueError, match="split must be one of train, val, test"):
        PlacedCharacters("valid")
    with pytest.raises(IndexError):
        PlacedCharacters(length=5)[5]


def test_letters_differ_in_drawers_between_splits():
    train, val = PlacedCharacters("train", length=5), PlacedCharacters("val", length=5)
    assert [len(glyphs) for glyphs in train._letters] == [16] * 5 and [
        len(glyphs) for glyphs in val._letters
    ] == [4] * 5
    known = {glyph.tobytes() for glyphs in train._letters for glyph in glyphs}
    assert not any(glyph.tobytes() in known for glyphs in val._letters for glyph in glyphs)
