"""Data sets of Hugging Face: by a stand-in for the calls that are made, and by the library where it is installed."""

import sys
from types import ModuleType, SimpleNamespace

import pytest
from data_cases import CLASSES, HALF, batches, picture, png

from visattn.data.hub_images import hub_images
from visattn.data.library_images import LibraryImages
from visattn.data.module import ImageData


class Rows:
    """A table of rows, with the calls of datasets.Dataset that are made: features, cast_column, rows[n], rows[name]."""

    def __init__(self, columns: dict, features: dict):
        self.columns, self.features = columns, features

    def cast_column(self, name: str, kind) -> "Rows":
        assert kind.decode is False
        return Rows(self.columns, self.features | {name: kind})

    def __getitem__(self, key):
        return (
            self.columns[key]
            if isinstance(key, str)
            else {name: values[key] for name, values in self.columns.items()}
        )


def stand_in(**loaded) -> ModuleType:
    module = ModuleType("datasets")
    module.Image = type(
        "Image", (), {"__init__": lambda self, decode=True: setattr(self, "decode", decode)}
    )
    module.ClassLabel = type(
        "ClassLabel", (), {"__init__": lambda self, names: setattr(self, "names", names)}
    )
    module.DownloadConfig = SimpleNamespace
    for name, function in loaded.items():
        setattr(module, name, function)
    return module


def rows_of(module: ModuleType, count: int, start: int = 0) -> Rows:
    pictures = [{"bytes": png(picture(start + n)), "path": None} for n in range(count)]
    labels = [n % 3 for n in range(count)]
    return Rows(
        {"img": pictures, "label": labels},
        {"img": module.Image(), "label": module.ClassLabel(CLASSES)},
    )


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A stand-in of the library with one data set on disk, whose folder it returns."""
    module = stand_in()
    found = {
        "train": rows_of(module, 12),
        "validation": rows_of(module, 5, 50),
        "extra": rows_of(module, 2),
    }
    module.load_from_disk = lambda path: found
    monkeypatch.setitem(sys.modules, "datasets", module)
    return SimpleNamespace(module=module, found=found, folder=str(tmp_path))


def test_splits_become_batches(hub):
    data = ImageData(
        dataset=f"hf:{hub.folder}", image_size=(11, 17), batch_size=4, num_workers=0, **HALF
    )
    data.setup("fit")
    assert data.classes == CLASSES and data.class_counts == [4, 4, 4]
    assert [label for _, labels in batches(data.val_dataloader()) for label in labels] == [
        0,
        1,
        2,
        0,
        1,
    ]
    images, labels = next(iter(data.train_dataloader()))
    assert images.shape == (4, 3, 11, 17) and labels.shape == (4,)
    source, _ = data.split("train")
    assert source.image(3).tobytes() == picture(3).tobytes() and source.name(3) == "ant/3"


def test_one_table_is_split(hub):
    hub.module.load_from_disk = lambda path: rows_of(hub.module, 12)
    data = ImageData(
        dataset=f"hf:{hub.folder}", image_size=8, num_workers=0, val_fraction=0.25, **HALF
    )
    data.setup("fit")
    assert data.class_counts == [3, 3, 3] and len(data.val_dataloader().dataset) == 3


def test_rows_without_an_image_and_images_by_path(hub, tmp_path):
    picture(7).save(tmp_path / "7.png")
    rows = hub.found["train"]
    rows.columns["img"][:3] = [
        None,
        {"bytes": None, "path": str(tmp_path / "7.png")},
        {"bytes": b"-", "path": None},
    ]
    source = hub_images(hub.folder)["train"]
    assert source.image(1).tobytes() == picture(7).tobytes()
    for index, reason in ((0, "holds no image"), (2, "not an image")):
        with pytest.raises(
            ValueError, match=f"cannot read image '{CLASSES[index]}/{index}': .*{reason}"
        ):
            source.image(index)
    data = ImageData(dataset=f"hf:{hub.folder}", image_size=8, batch_size=3, num_workers=0, **HALF)
    data.setup("fit")
    list(data.train_dataloader())
    assert data.skipped == ["ant/0", "cat/2"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda hub: hub.found.pop("train"), "has no split named train; it has validation, extra"),
        (
            lambda hub: hub.found["train"].features.pop("label"),
            "one column of images and one of class labels; got",
        ),
        (
            lambda hub: hub.found["train"].columns["label"].__setitem__(5, -1),
            "train: 1 images have a label out of",
        ),
    ],
    ids=["no-train", "no-labels", "unlabeled-row"],
)
def test_refusals(hub, change, message):
    change(hub)
    with pytest.raises(ValueError, match=message):
        ImageData(dataset=f"hf:{hub.folder}", image_size=8, **HALF).setup("fit")


def test_the_network_is_asked_only_on_request(hub):
    asked = []

    def load_dataset(name, download_config):
        asked.append((name, download_config.local_files_only))
        raise ConnectionError("no such thing\nhere")

    hub.module.load_dataset = load_dataset
    for download, hint in ((False, "download: true to fetch it"), (True, r"\(no such thing\)$")):
        with pytest.raises(FileNotFoundError, match=hint):
            hub_images("someone/pictures", download)
    assert asked == [("someone/pictures", True), ("someone/pictures", False)]


def test_without_the_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(
        ImportError, match=r"hf:mnist needs the package datasets: pip install 'visattn\[hf\]'"
    ):
        hub_images("mnist")


def test_the_library_itself(tmp_path):
    datasets = pytest.importorskip("datasets", reason="the extra `hf` is not installed")
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=CLASSES)}
    )
    rows = {
        "image": [{"bytes": png(picture(n)), "path": None} for n in range(9)],
        "label": [n % 3 for n in range(9)],
    }
    datasets.DatasetDict({"train": datasets.Dataset.from_dict(rows, features)}).save_to_disk(
        tmp_path / "saved"
    )
    source = hub_images(str(tmp_path / "saved"))["train"]
    assert (
        isinstance(source, LibraryImages)
        and source.classes == CLASSES
        and source.labels.tolist() == [0, 1, 2] * 3
    )
    assert source.image(4).tobytes() == picture(4).tobytes()
    with pytest.raises(FileNotFoundError, match="download: true"):
        hub_images("someone/no-such-data-set")
