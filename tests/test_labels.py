"""Labels from a table beside the images, one class or several per image; weights, checks and splits of labels."""

from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from data_cases import CLASSES, batches, image_data, make_split, make_zip, picture

from visattn.data.labels import check_labels, class_weights, split_stratified


@pytest.fixture
def photos(tmp_path):
    """Twelve pictures in one folder, without classes."""
    (tmp_path / "photos" / "deep").mkdir(parents=True)
    for number in range(12):
        picture(number).save(
            tmp_path / "photos" / ("deep" if number % 2 else "") / f"{number:02d}.png"
        )
    return tmp_path / "photos"


def name(number: int) -> str:
    return f"deep/{number:02d}.png" if number % 2 else f"{number:02d}.png"


def table(folder, header: str, rows: list[str], file: str = "labels.csv"):
    (folder / file).write_text("\n".join([header, *rows]) + "\n", encoding="utf-8")
    return file


SEVERAL = [
    f"{name(n)}, {';'.join(c for c in CLASSES if n % (CLASSES.index(c) + 2) == 0)}"
    for n in range(12)
]


def test_one_class_per_image(photos):
    rows = [f"{name(n)},{CLASSES[n % 3]},{'valid' if n > 8 else 'train'}" for n in range(12)]
    data = image_data(photos, labels=table(photos, "file,label,split", rows))
    assert data.classes == CLASSES and data.class_counts == [3, 3, 3] and not data.multilabel
    assert sorted(label for _, labels in batches(data.val_dataloader()) for label in labels) == [
        0,
        1,
        2,
    ]


def test_a_table_may_lie_elsewhere_and_the_images_in_a_zip(photos, tmp_path):
    rows = [f"./{name(n)},{n % 2 + 9}" for n in range(12)]
    path = tmp_path / table(tmp_path, "\ufefffile,label", rows, "other.csv")
    data = image_data(make_zip(photos, tmp_path / "x.zip"), labels=str(path), val_fraction=0.25)
    assert data.classes == ["9", "10"]  # numbers in their own order
    assert sum(data.class_counts) == 8 and len(data.val_dataloader().dataset) == 4


def test_a_table_in_the_zip_with_the_images(photos, tmp_path):
    table(photos / "deep", "file,label", [f"{name(n)},{CLASSES[n % 3]}" for n in range(12)])
    data = image_data(
        make_zip(photos, tmp_path / "x.zip"), labels="deep/labels.csv", val_fraction=0.25
    )
    assert data.classes == CLASSES and data.class_counts == [3, 3, 3]


def test_several_classes_per_image(photos):
    data = image_data(
        photos, labels=table(photos, "file,labels", SEVERAL), val_fraction=0.25, batch_size=3
    )
    assert data.multilabel and data.classes == CLASSES
    source, indices = data.split("train")
    assert data.class_counts == source.labels[indices].sum(0).tolist() and len(indices) == 9
    for loader in (data.train_dataloader(), data.val_dataloader()):
        for images, labels in loader:
            assert (
                labels.shape == (3, 3)
                and labels.dtype == torch.float32
                and images.shape == (3, 3, 11, 17)
            )
    for index, row in enumerate(source.labels):
        number = int(source.name(index)[-6:-4])
        assert row.tolist() == [int(number % (place + 2) == 0) for place in range(3)]
    assert [0, 0, 0] in source.labels.tolist()  # an image of none of the classes


def test_loader_gives_the_rows_of_the_table(photos):
    data = image_data(
        photos, labels=table(photos, "file,labels", SEVERAL), augment="none", batch_size=1
    )
    source, indices = data.split("val")
    for position, (_, labels) in enumerate(data.val_dataloader()):
        assert labels[0].tolist() == source.labels[indices[position]].tolist()


def test_images_without_a_row_are_listed(photos):
    data = image_data(
        photos,
        labels=table(photos, "file,label", [f"{name(n)},{CLASSES[n % 2]}" for n in range(10)]),
    )
    assert data.skipped == [name(10), name(11)]


@pytest.mark.parametrize(
    ("header", "rows", "message"),
    [
        (
            "name,label",
            ["00.png,ant"],
            "must have the columns file and either label .* got name, label",
        ),
        ("file,label,labels", ["00.png,ant,ant"], "must have the columns file and either"),
        ("", [], "got none"),
        ("file,label", [], "has no rows"),
        (
            "file,label",
            ["00.png,ant", "0.png,bee"],
            r"1 files of .* are no images in root, the first is '0\.png'; did you mean '\d0\.png'",
        ),
        ("file,label", ["00.png,ant", "00.png,bee"], "names '00.png' twice"),
        ("file,label", ["00.png,ant", "02.png,ant"], r"at least two classes, got \['ant'\]"),
        ("file,label", ["00.png,ant", "02.png,"], "line 3 of .* has no label"),
        (
            "file,label,split",
            ["00.png,ant,train", "02.png,bee,dev"],
            "line 3 of .*: split must be train, val or test, got 'dev'",
        ),
        ("file,label,split", ["00.png,ant,val", "02.png,bee,val"], "no row whose split is train"),
    ],
)
def test_refused_tables(photos, header, rows, message):
    with pytest.raises(ValueError, match=message):
        image_data(photos, labels=table(photos, header, rows))


def test_other_refusals(photos, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"labels: there is no file 'labls\.csv'"):
        image_data(photos, labels="labls.csv")
    with pytest.raises(ValueError, match="give root, and no dataset"):
        image_data(photos, labels="x.csv", dataset="mnist")
    (photos / "bad.csv").write_bytes(b"file,label\n\xff\xfe,x\n")
    with pytest.raises(ValueError, match="is no CSV file"):
        image_data(photos, labels="bad.csv")
    data = image_data(photos, labels=table(photos, "file,labels", SEVERAL), balanced=True)
    with pytest.raises(ValueError, match=r"balanced .* needs one label per image"):
        data.train_dataloader()


def test_labels_out_of_range_name_the_image():
    source = SimpleNamespace(labels=np.array([0, 2, 1, 3, -1]), classes=CLASSES)
    with pytest.raises(
        ValueError,
        match=r"test: 2 images have a label out of range, .* image 3 with 3; there are 3",
    ):
        check_labels("test", source)
    check_labels("test", SimpleNamespace(labels=np.array([0, 2]), classes=CLASSES))


def test_class_weights_are_inverse_to_counts_and_one_on_average(tmp_path):
    make_split(tmp_path, (20, 4, 8))
    data = image_data(tmp_path, val_fraction=0.25)
    counts, weights = np.array(data.class_counts), np.array(data.class_weights)
    np.testing.assert_allclose((counts * weights).sum() / counts.sum(), 1)
    np.testing.assert_allclose(counts * weights, np.full(3, counts.sum() / 3))
    assert class_weights([5, 0, 15]) == [2.0, 0.0, pytest.approx(2 / 3)]


def test_split_of_several_classes_takes_a_fraction_of_the_images():
    labels = np.ones((20, 3), dtype=np.uint8)
    rest, held = split_stratified(labels, 0.3, 1)
    assert len(held) == 6 and sorted([*rest, *held]) == list(range(20))
    assert Counter(held.tolist()) != Counter(split_stratified(labels, 0.3, 2)[1].tolist())
