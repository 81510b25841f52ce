"""Tar shards: what pack writes, training reads to the bit; foreign, uneven and broken ones."""

import gc
import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from data_cases import (
    CLASSES,
    COUNTS,
    batches,
    encoded,
    image_data,
    make_tree,
    make_zip,
    picture,
    png,
)

from visattn.__main__ import main
from visattn.commands.pack import write_shards
from visattn.data import module as data_module
from visattn.data.images import list_classes
from visattn.data.shards import find_shards, list_shards
from visattn.data.stores import Folder
from visattn.data.tar_index import read_index, scan_shards, write_index


def pack(*arguments) -> int:
    return main(["pack", *map(str, arguments)])


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    return make_tree(tmp_path_factory.mktemp("data") / "photos")


@pytest.fixture(scope="module")
def shards(tree, tmp_path_factory) -> Path:
    """The tree in many small shards of uneven numbers of images."""
    out = tmp_path_factory.mktemp("shards")
    paths, lost = [], []
    for split, images in list_classes(tree).items():
        paths += write_shards(images, range(len(images)), out, split, size=5_000, lost=lost)
    assert not lost
    return out


def write_tar(path: Path, files: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as shard:
        for name, data in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            shard.addfile(entry, io.BytesIO(data))
    return path


def looks(source) -> set[tuple[bytes, str]]:
    return {
        (source.image(i).tobytes(), source.classes[source.labels[i]]) for i in range(len(source))
    }


def test_pack_keeps_every_image_and_class(tree, tmp_path, capsys):
    assert pack(tree, tmp_path / "out") == 0
    assert "33 images of 3 classes lie in 2 shards" in capsys.readouterr().out
    before, after = list_classes(tree), list_shards(tmp_path / "out")
    assert before.keys() == after.keys() == {"train", "val"}
    assert all(
        after[split].classes == CLASSES and looks(after[split]) == looks(before[split])
        for split in before
    )
    assert pack(make_zip(tree, tmp_path / "x.zip"), tmp_path / "again") == 0
    assert looks(list_shards(tmp_path / "again")["val"]) == looks(before["val"])


@pytest.mark.filterwarnings(
    "ignore:unclosed file:ResourceWarning"
)  # webdataset leaves its shards open
def test_pack_writes_what_webdataset_reads(tree, tmp_path):
    assert pack(tree, tmp_path / "out") == 0
    with tarfile.open(tmp_path / "out" / "val-000000.tar") as shard:
        names = shard.getnames()
        label = shard.extractfile(names[1]).read()
    keys = [name.partition(".")[0] for name in names]
    assert (
        keys[::2] == keys[1::2] and len(set(keys)) == 10
    )  # the files of a sample follow each other
    assert {name.partition(".")[2] for name in names} == {"png", "cls"} and label in (
        b"0",
        b"1",
        b"2",
    )
    webdataset = pytest.importorskip("webdataset", reason="the extra `shards` is not installed")
    samples = list(
        webdataset.WebDataset(str(tmp_path / "out" / "val-000000.tar"), shardshuffle=False).decode(
            "pil"
        )
    )
    gc.collect()  # while the warning is ignored
    assert len(samples) == 10 and {sample["cls"] for sample in samples} == {0, 1, 2}
    assert all(sample["png"].size == (19, 13) for sample in samples)


def test_training_on_shards_is_training_on_files(tree, shards):
    data, files = image_data(shards), image_data(tree)
    assert data.class_counts == files.class_counts == list(COUNTS["train"])
    assert len(find_shards(shards)) > 5 and data.classes == [
        "0",
        "1",
        "2",
    ]  # nothing names the classes of these
    assert len(data.val_dataloader()) == len(files.val_dataloader())
    seen = [image.numpy().tobytes() for images, _ in data.val_dataloader() for image in images]
    expected = [image.numpy().tobytes() for images, _ in files.val_dataloader() for image in images]
    assert sorted(seen) == sorted(expected)
    first = batches(data.train_dataloader())
    assert [len(labels) for _, labels in first] == [
        5,
        5,
        5,
        5,
    ]  # the epoch's exact size, less an incomplete batch


@pytest.mark.parametrize("workers", [0, 2])
def test_more_ranks_and_workers_than_shards(tree, tmp_path, monkeypatch, workers):
    assert pack(tree, tmp_path / "out") == 0  # one shard of train, one of val
    trained, validated = [], []
    for rank in range(3):
        monkeypatch.setattr(data_module, "rank_and_world", lambda rank=rank: (rank, 3))
        data = image_data(tmp_path / "out", num_workers=workers, batch_size=2)
        trained.append([labels for _, labels in batches(data.train_dataloader())])
        validated += [
            image.numpy().tobytes() for images, _ in data.val_dataloader() for image in images
        ]
    assert {len(part) for part in trained} == {
        4
    }  # every process makes as many steps: none waits for another
    assert len(validated) == len(set(validated)) == 10


def test_the_index_is_used_and_not_believed_blindly(shards, tmp_path, monkeypatch):
    paths = [tmp_path / path.name for path in find_shards(shards)]
    for path in paths:
        path.write_bytes((shards / path.name).read_bytes())
    assert read_index(tmp_path, paths) is None
    write_index(tmp_path, paths)
    index, classes = read_index(tmp_path, paths)
    fresh, _ = scan_shards(tmp_path, paths)
    assert classes == ["0", "1", "2"]
    for name in ("shard", "offset", "size", "label"):
        np.testing.assert_array_equal(getattr(index, name), getattr(fresh, name))
    assert [index.names[i] for i in range(33)] == [fresh.names[i] for i in range(33)]
    size = paths[0].stat().st_size
    write_tar(paths[0], {"a.png": png(picture(0)), "a.cls": b"2"})
    assert paths[0].stat().st_size == size  # a tar file is padded
    assert read_index(tmp_path, paths) is None  # of other shards: scanned anew
    assert len(list_shards(tmp_path)["train"]) < 23
    paths[0].unlink()
    with pytest.raises(
        FileNotFoundError, match=r"lacks 1 of its shards, the first is 'train-000000\.tar'"
    ):
        list_shards(tmp_path)


def test_foreign_shards(tmp_path):
    (tmp_path / "train").mkdir()
    files = {f"{n}/x.y.JPG": encoded(picture(n), "JPEG") for n in range(4)}
    mixed = {
        k: v
        for n, (name, data) in enumerate(files.items())
        for k, v in ((name, data), (f"{n}/x.cls", b"dog\n"))
    }
    write_tar(
        tmp_path / "train" / "00.tar",
        {"n/a.png": png(picture(9)), "n/a.cls": b"cat", "n/a.json": b"{}"} | mixed,
    )
    write_tar(tmp_path / "shop-val-0.tar", {"b.webp": encoded(picture(7), "WEBP"), "b.cls": b"dog"})
    found = list_shards(tmp_path)
    assert {split: len(images) for split, images in found.items()} == {"train": 5, "val": 1}
    assert found["train"].classes == ["cat", "dog"] and found["train"].labels.tolist() == [
        0,
        1,
        1,
        1,
        1,
    ]
    assert found["val"].name(0) == "shop-val-0.tar/b" and found["val"].image(0).size == (19, 13)
    single = list_shards(tmp_path / "train" / "00.tar")
    assert len(single["train"]) == 5


def test_broken_samples_are_left_out_and_listed(tmp_path):
    good = {
        k: v
        for n in range(6)
        for k, v in ((f"{n}.png", png(picture(n))), (f"{n}.cls", str(n % 2).encode()))
    }
    broken = {
        "a.png": b"no image",
        "a.cls": b"0",
        "b.png": png(picture(8)),
        "c.cls": b"1",
        "d.cls": b"",
        "d.png": b"x",
    }
    write_tar(tmp_path / "train-0.tar", good | broken)
    whole = write_tar(
        tmp_path / "whole.tar",
        {f"{n}.{e}": good[f"{n}.{e}"] for n in range(3) for e in ("png", "cls")},
    )
    with tarfile.open(whole) as shard:
        cut = shard.getmember("2.png").offset_data + 30
    (tmp_path / "val-0.tar").write_bytes(whole.read_bytes()[:cut])
    whole.unlink()
    data = image_data(tmp_path, batch_size=3)
    seen = [label for _, labels in batches(data.val_dataloader()) for label in labels]
    assert sorted(seen) == [0, 1]
    trained = batches(data.train_dataloader())
    assert {len(labels) for _, labels in trained} == {3}
    told = "\n".join(data.skipped)
    for text in (
        "train-0.tar/a",
        "b: has no label",
        "c: has no image",
        "d: has no label",
        "val-0.tar: ends in the middle",
    ):
        assert text in told
    with pytest.raises(
        ValueError, match=r"cannot read image 'train-0\.tar/a': it is empty or not an image"
    ):
        for _ in range(3):
            list(image_data(tmp_path, on_error="raise").train_dataloader())


@pytest.mark.parametrize(
    ("name", "files", "message"),
    [
        (
            "x.tar",
            {"a.png": png(picture(0)), "a.cls": b"7"},
            "label out of range, the first is image 0 with 7; there are 2",
        ),
        (
            "x.tar",
            {"a.png": png(picture(0)), "a.cls": b"dog"},
            r"the label 'dog', which is not in classes\.txt: ant, bee",
        ),
        (
            "x.tar",
            {"a.png": png(picture(0)), "a.cls": b"-1"},
            r"has the label '-1', which is not in classes\.txt",
        ),
        ("x.tar", {"a.txt": b"-"}, "hold no image with a label"),
        (
            "val-0.tar",
            {"a.png": png(picture(0)), "a.cls": b"1"},
            "has shards of val but none of train",
        ),
    ],
    ids=["out-of-range", "unknown-class", "negative", "empty", "no-train"],
)
def test_refused_shards(tmp_path, name, files, message):
    write_tar(tmp_path / name, files)
    (tmp_path / "classes.txt").write_text("ant\nbee\n")
    with pytest.raises(ValueError, match=message):
        image_data(tmp_path)


def test_a_file_that_is_no_tar(tmp_path):
    (tmp_path / "train.tar").write_bytes(b"Dear diary" * 100)
    with pytest.raises(ValueError, match=r"train\.tar' is not a readable tar file"):
        image_data(tmp_path)


def test_pack_refuses_and_tells(tree, tmp_path, capsys):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("-")
    for words, message in (
        ((tree, tmp_path / "full"), "is not empty"),
        ((tmp_path / "none", tmp_path / "new"), "there is no folder or zip file"),
        ((tree, tmp_path / "new", "--shard-mib", 0), "--shard-mib must be 1 or more, got 0"),
    ):
        assert pack(*words) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_pack_leaves_out_what_cannot_be_read(tree, tmp_path, monkeypatch, capsys):
    read = Folder.read

    def failing(self, name: str) -> bytes:
        if "ant/00" in name:
            raise OSError("lost")
        return read(self, name)

    monkeypatch.setattr(Folder, "read", failing)
    assert pack(tree, tmp_path / "out") == 1
    told = capsys.readouterr()
    assert (
        "31 images" in told.out
        and "left out: cannot read image 'train/ant/00.png': lost" in told.err
    )


def test_interrupted_shard_has_no_final_name(tree, tmp_path):
    images = list_classes(tree)["train"]

    def interrupted():
        yield from range(3)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_shards(images, interrupted(), tmp_path, "train", size=10**6, lost=[])
    assert not list(tmp_path.glob("*.tar"))


def test_resume_in_the_middle_of_an_epoch_of_shards(shards):
    whole = batches(image_data(shards).train_dataloader())
    loader = image_data(shards).train_dataloader()
    for _, _ in zip(range(2), loader, strict=False):
        state = loader.state_dict()
    resumed = image_data(shards, num_workers=2).train_dataloader()
    resumed.load_state_dict(state)
    rest = batches(resumed)
    assert len(rest) == len(whole) - 2
    for (images, labels), (others, expected) in zip(rest, whole[2:], strict=True):
        assert labels == expected and torch.equal(images, others)
