"""Data: what is found in folders, zips and torchvision's sets, and what is refused."""

import os
import pickle
import re
import subprocess
import sys
import zipfile
from collections import Counter
from pathlib import Path

import pytest
import torch
from data_cases import (
    CLASSES,
    COUNTS,
    HALF,
    REFUSALS,
    SOURCE_ARGUMENTS,
    assert_same,
    batches,
    image_data,
    make_split,
    make_tree,
    make_zip,
    picture,
    png,
)
from PIL import Image

from visattn.__main__ import main
from visattn.bench.data import _make_files, begin
from visattn.data.images import PackedNames, list_classes
from visattn.data.module import ImageData
from visattn.data.source import SourceOptions
from visattn.data.sources import SOURCE_TYPES, find_source_type


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    return make_tree(tmp_path_factory.mktemp("data") / "photos")


@pytest.fixture(scope="module")
def archive(tree, tmp_path_factory) -> Path:
    return make_zip(tree, tmp_path_factory.mktemp("zip") / "photos.zip")


def test_batches_of_a_tree(tree):
    data = image_data(tree)
    assert (data.classes, data.num_classes, data.channels) == (CLASSES, 3, 3)
    assert data.class_counts == list(COUNTS["train"])
    assert data.skipped == []  # junk of operating systems is not worth a word
    images, labels = next(iter(data.train_dataloader()))
    assert (
        images.shape == (5, 3, 11, 17) and images.dtype == torch.float32 and images.is_contiguous()
    )
    assert labels.shape == (5,) and labels.dtype == torch.int64
    seen = Counter(label for _, labels in batches(data.val_dataloader()) for label in labels)
    assert [seen[label] for label in range(3)] == list(COUNTS["val"])


@pytest.mark.parametrize(
    ("prefix", "compression"), [("", zipfile.ZIP_STORED), ("photos/", zipfile.ZIP_DEFLATED)]
)
def test_zip_equals_folder(tree, tmp_path, prefix, compression):
    packed = make_zip(tree, tmp_path / "x.zip", prefix, compression)
    assert_same(
        batches(image_data(packed).val_dataloader()), batches(image_data(tree).val_dataloader())
    )
    assert image_data(packed).classes == CLASSES


def test_zip_without_folder_entries(tree, tmp_path):
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as packed:
        for path in tree.rglob("*.png"):
            packed.write(path, path.relative_to(tree).as_posix())
    assert image_data(tmp_path / "x.zip").class_counts == list(COUNTS["train"])


def test_one_folder_of_classes_is_split_evenly_and_reproducibly(tmp_path):
    make_split(tmp_path, (10, 20, 40))
    (tmp_path / "ant" / "deep").mkdir()
    picture(0).save(tmp_path / "ant" / "deep" / "x.png")

    images = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.png"))

    def names(split: str, **options) -> list[str]:
        source, indices = image_data(tmp_path, val_fraction=0.2, **options).split(split)
        return [source.name(index) for index in indices]

    assert Counter(name.split("/")[0] for name in names("val")) == {"ant": 2, "bee": 4, "cat": 8}
    assert sorted(names("val") + names("train")) == images
    assert names("val") == names("val") != names("val", seed=1)
    with pytest.raises(ValueError, match=r"val_fraction must lie between 0 and 1, got 1\.5"):
        image_data(tmp_path, val_fraction=1.5)


def test_train_folder_alone_is_split_and_test_folder_is_kept(tmp_path):
    make_split(tmp_path / "train", (5, 5, 5))
    make_split(tmp_path / "test", (1, 2, 3))
    data = image_data(tmp_path)
    assert data.class_counts == [4, 4, 4]
    assert sum(len(labels) for _, labels in data.test_dataloader()) == 6


@pytest.mark.parametrize("name", ["valid", "validation"])
def test_other_names_of_the_validation_folder(tmp_path, name):
    make_tree(tmp_path / "photos")
    (tmp_path / "photos" / "val").rename(tmp_path / "photos" / name)
    data = image_data(tmp_path / "photos")
    assert data.class_counts == list(COUNTS["train"])
    assert sum(len(labels) for _, labels in data.val_dataloader()) == sum(COUNTS["val"])


def test_class_named_train_is_a_class(tmp_path):
    for name in ("car", "train"):
        (tmp_path / name).mkdir()
        for number in range(3):
            picture(number).save(tmp_path / name / f"{number}.png")
    assert image_data(tmp_path).classes == ["car", "train"]


def test_every_process_opens_the_zip_for_itself(archive, monkeypatch):
    store = list_classes(archive)["train"].store
    data = store.read("train/ant/00.png")
    first = store._handle
    assert pickle.loads(pickle.dumps(store))._handle is None
    monkeypatch.setattr(os, "getpid", lambda: -1)  # as after a fork
    assert store.read("train/ant/00.png") == data
    assert store._handle is not first


def test_splits_that_do_not_exist(tree):
    data = image_data(tree)
    with pytest.raises(
        ValueError, match="no images for test: give a root or dataset with a test part"
    ):
        data.test_dataloader()
    with pytest.raises(ValueError, match="no images for predict: give predict_root"):
        data.predict_dataloader()
    with pytest.raises(ValueError, match="give root"):
        ImageData()


@pytest.mark.parametrize(
    ("build", "options", "error", "message"), REFUSALS, ids=range(len(REFUSALS))
)
def test_refuses(tmp_path, build, options, error, message):
    if build is not None:
        build(tmp_path / "photos")
    with pytest.raises(error, match=message):
        image_data(tmp_path / "photos", **options).train_dataloader()


def test_missing_root_names_its_neighbor(tree):
    with pytest.raises(FileNotFoundError, match=r"did you mean .*photos"):
        image_data(tree.parent / "phtos")


@pytest.mark.parametrize("kind", ["folder", "zip", "file"])
def test_predict_root(tree, archive, kind):
    root = {
        "folder": tree / "val" / "bee",
        "zip": archive,
        "file": tree / "val" / "bee" / "01.png",
    }[kind]
    data = ImageData(predict_root=str(root), image_size=8, num_workers=0, **HALF)
    data.setup("predict")
    names = [name for _, batch in data.predict_dataloader() for name in batch]
    count = {"folder": 3, "zip": 33, "file": 1}[kind]
    assert len(names) == len(set(names)) == count and all(name.endswith(".png") for name in names)


def test_predict_leaves_out_what_it_cannot_read(tmp_path):
    for number in range(3):
        picture(number).save(tmp_path / f"{number}.png")
    (tmp_path / "1.png").write_bytes(b"")
    (tmp_path / "notes.txt").write_text("-")
    data = ImageData(predict_root=str(tmp_path), image_size=8, batch_size=1, num_workers=0, **HALF)
    data.setup("predict")
    assert [names for _, names in data.predict_dataloader()] == [("0.png",), ("2.png",)]
    assert data.skipped == ["1.png", "notes.txt"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"predict_root: .*holds no image"):
        ImageData(predict_root=str(tmp_path / "empty"), **HALF).setup("predict")


def write_mnist(folder: Path) -> None:
    folder.mkdir(parents=True)
    for part, count in (("train", 40), ("t10k", 7)):
        header = (0x803).to_bytes(4, "big") + b"".join(
            n.to_bytes(4, "big") for n in (count, 28, 28)
        )
        (folder / f"{part}-images-idx3-ubyte").write_bytes(
            header + bytes(i % 251 for i in range(count * 784))
        )
        header = (0x801).to_bytes(4, "big") + count.to_bytes(4, "big")
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(
            header + bytes(i % 10 for i in range(count))
        )


def test_torchvision_data_set(tmp_path):
    write_mnist(tmp_path / "FashionMNIST" / "raw")
    data = ImageData(
        str(tmp_path), "fashion_mnist", image_size=14, num_workers=0, val_fraction=0.25, **HALF
    )
    data.prepare_data()
    data.setup("fit")
    assert (
        data.num_classes == 10 and data.classes[9] == "Ankle boot" and data.class_counts == [3] * 10
    )
    assert sum(len(labels) for _, labels in data.val_dataloader()) == 10
    assert sum(len(labels) for _, labels in data.test_dataloader()) == 7
    images, _ = next(iter(data.train_dataloader()))
    assert images.shape == (30, 3, 14, 14)


@pytest.mark.parametrize(
    "name", ["cifar10", "cifar100", "fashion_mnist", "mnist", "svhn", "food101", "oxford_pets"]
)
def test_torchvision_data_set_is_fetched_only_on_request(tmp_path, name):
    with pytest.raises(FileNotFoundError, match=f"'{name}' is not in root .*download: true"):
        ImageData(str(tmp_path), name).setup("fit")
    assert not list(tmp_path.rglob("*.*"))


def test_names_are_stored_compactly():
    names = [f"train/n{number % 1000:08d}/image_{number:08d}.JPEG" for number in range(100_000)]
    packed = PackedNames(names)
    assert len(packed) == 100_000 and packed[0] == names[0] and packed[99_999] == names[99_999]
    assert len(pickle.dumps(packed)) < 1.25 * sum(map(len, names))
    assert (
        PackedNames(["grüße/\udcff.png"])[0] == "grüße/\udcff.png"
    )  # names that are not UTF-8 survive


@pytest.mark.slow
def test_a_hundred_thousand_files(tmp_path):
    pixel = png(Image.new("L", (1, 1)))
    for number in range(100):
        (tmp_path / f"class{number:02d}").mkdir()
        for other in range(1000):
            (tmp_path / f"class{number:02d}" / f"{other:04d}.png").write_bytes(pixel)
    data = image_data(tmp_path)
    assert (
        sum(data.class_counts) == 85_000 and len(pickle.dumps(data.split("train")[0])) < 4_000_000
    )


def test_the_transform_alone_imports_neither_lightning_nor_albumentations():
    code = (
        "import sys, visattn.data.transform, visattn.data.augment, visattn.data.images;"
        "print(sorted({'lightning', 'albumentations', 'torchvision', 'cv2'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], check=True, capture_output=True, text=True
    )
    assert done.stdout.strip() == "[]" and done.stderr == ""


def test_bench_tells_what_reading_costs(tree, capsys):
    assert (
        main(
            [
                "bench",
                "data",
                "--photos",
                str(tree),
                "--image-size",
                "16",
                "--repeats",
                "1",
                "--files",
                "0",
            ]
        )
        == 0
    )
    rows = dict(re.findall(r"^\| (\w[\w ]*?) +\| (\d+) +\|", capsys.readouterr().out, re.MULTILINE))
    assert (
        set(rows) == {"decode alone", "validation", "crop", "light", "strong", "trivial"}
        and min(map(int, rows.values())) > 0
    )


def test_bench_lists_the_files_it_made(tmp_path):
    _make_files(tmp_path, 30, 3)
    images, labels = begin(str(tmp_path))()
    assert images.shape == (24, 3, 32, 32) and labels.bincount().tolist() == [8, 8, 8]


@pytest.mark.parametrize("source_type", SOURCE_TYPES, ids=lambda source_type: source_type.name)
def test_arguments_select_one_source_type(source_type, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.tar").touch()
    arguments = {"root": None, "dataset": None, "labels": None}
    arguments |= SOURCE_ARGUMENTS[source_type.name]
    options = SourceOptions(**arguments, download=False, image_size=(24, 24), seed=0)
    assert find_source_type(options) is source_type
