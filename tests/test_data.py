"""Data: what is listed, how odd files are read; order and augmentation depend on seed, epoch and index alone."""

import logging
import os
import pickle
import subprocess
import sys
import warnings
import zipfile
from collections import Counter
from pathlib import Path

import cv2
import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from data_cases import BROKEN, CLASSES, COUNTS, ODD, REFUSALS, make_split, make_tree, make_zip, picture, png
from PIL import Image
from torch.nn.functional import cross_entropy

from visattn.data import decode
from visattn.data import module as data_module
from visattn.data.augment import AUGMENTS, TrainTransform
from visattn.data.images import Names, list_classes
from visattn.data.loader import EpochSampler
from visattn.data.module import ImageData
from visattn.data.synthetic import PlacedCharacters
from visattn.data.transform import EvalTransform, build_transform, cover

ASSETS = Path(__file__).parents[1] / "assets"
HALF = {"mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25)}


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    return make_tree(tmp_path_factory.mktemp("data") / "photos")


@pytest.fixture(scope="module")
def archive(tree, tmp_path_factory) -> Path:
    return make_zip(tree, tmp_path_factory.mktemp("zip") / "photos.zip")


def image_data(root, **options) -> ImageData:
    settings = {"image_size": (11, 17), "batch_size": 5, "num_workers": 0, **HALF} | options
    data = ImageData(str(root), **settings)
    data.setup("fit")
    return data


def batches(loader) -> list[tuple[torch.Tensor, list[int]]]:
    return [(images, labels.tolist()) for images, labels in loader]


def assert_same(left, right) -> None:
    assert [labels for _, labels in left] == [labels for _, labels in right]
    for (images, _), (others, _) in zip(left, right, strict=True):
        torch.testing.assert_close(images, others, rtol=0, atol=0)


# what is found


def test_batches_of_a_tree(tree):
    data = image_data(tree)
    assert (data.classes, data.num_classes, data.channels) == (CLASSES, 3, 3)
    assert data.class_counts == list(COUNTS["train"])
    assert data.skipped == []  # junk of operating systems is not worth a word
    images, labels = next(iter(data.train_dataloader()))
    assert images.shape == (5, 3, 11, 17) and images.dtype == torch.float32 and images.is_contiguous()
    assert labels.shape == (5,) and labels.dtype == torch.int64
    seen = Counter(label for _, labels in batches(data.val_dataloader()) for label in labels)
    assert [seen[label] for label in range(3)] == list(COUNTS["val"])


@pytest.mark.parametrize(("prefix", "compression"), [("", zipfile.ZIP_STORED), ("photos/", zipfile.ZIP_DEFLATED)])
def test_zip_equals_folder(tree, tmp_path, prefix, compression):
    packed = make_zip(tree, tmp_path / "x.zip", prefix, compression)
    assert_same(batches(image_data(packed).val_dataloader()), batches(image_data(tree).val_dataloader()))
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
        source, indices = image_data(tmp_path, val_fraction=0.2, **options)._part(split)
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
    with pytest.raises(ValueError, match="no images for test: give a root or dataset with a test part"):
        data.test_dataloader()
    with pytest.raises(ValueError, match="no images for predict: give predict_root"):
        data.predict_dataloader()
    with pytest.raises(ValueError, match="give root"):
        ImageData()


@pytest.mark.parametrize(("build", "options", "error", "message"), REFUSALS, ids=range(len(REFUSALS)))
def test_refuses(tmp_path, build, options, error, message):
    if build is not None:
        build(tmp_path / "photos")
    with pytest.raises(error, match=message):
        image_data(tmp_path / "photos", **options).train_dataloader()


def test_missing_root_names_its_neighbor(tree):
    with pytest.raises(FileNotFoundError, match=r"did you mean .*photos"):
        image_data(tree.parent / "phtos")


# how files are read


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
    with Image.open(tmp_path / "ant" / name) as image:  # as a user of the classifier would hand it in
        transform = build_transform({"image_size": list(size), "resize": "cover", "mean": [0.5] * 3, "std": [0.25] * 3})
        torch.testing.assert_close(transform(image), images[0])


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
    assert Counter(label for _, labels in seen for label in labels) == dict(enumerate(COUNTS["val"]))
    assert all(len(labels) for _, labels in seen)
    trained = batches(data.train_dataloader())
    assert {len(labels) for _, labels in trained} == {3}  # another image takes the place of a broken one
    expected = [f"{split}/bee/{name}" for split in ("train", "val") for name in [*BROKEN, "notes.txt"]]
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
    assert stretched[:, :9].max() < 15 and stretched[:, 11:19].min() > 240 and stretched[:, 21:].max() < 15


@pytest.mark.parametrize("size", [(1, 5000), (5000, 1), (31, 17), (17, 17), (1, 1)])
def test_cover_covers_without_growing_unbounded(size):
    image = cover(Image.new("RGB", size), 13, 17)
    assert 17 <= image.width <= 17 * 5 and 13 <= image.height <= 13 * 5
    assert image.width == 17 or image.height == 13


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


def test_none_augments_nothing(tree):
    data = image_data(tree, augment="none", batch_size=1)
    source, indices = data._part("train")
    transform = build_transform(data.transform_config())
    for draw, (images, _) in zip(data.train_dataloader().sampler, data.train_dataloader(), strict=True):
        torch.testing.assert_close(images[0], transform(source.image(indices[draw.index])))


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("name", AUGMENTS)
@pytest.mark.parametrize("size", [(1, 1), (1, 13), (31, 17), (500, 20)])
def test_augmentations_at_odd_sizes(name, flip, size):
    transform = TrainTransform(EvalTransform((11, 17)), name, flip=flip)
    image = picture(1, size)
    before = image.tobytes()
    for number in range(20):
        tensor = transform.apply(image, (0, number, 0))
        assert tensor.shape == (3, 11, 17) and tensor.dtype == torch.float32 and tensor.isfinite().all()
    assert image.tobytes() == before


def test_flip_mirrors_half_of_the_images_and_only_on_request():
    image = picture(1, (17, 11))
    pixels = np.asarray(image)
    mirrored = [
        (TrainTransform(EvalTransform((11, 17)), "none", flip=flip).pixels(image, (0, i, 0)) != pixels).any()
        for flip in (True, False)
        for i in range(200)
    ]
    assert 70 < sum(mirrored[:200]) < 130 and not any(mirrored[200:])


@pytest.mark.parametrize("name", ["light", "strong", "trivial"])
def test_augmentation_depends_on_seed_epoch_index_and_copy(name):
    image = picture(2, (40, 30))

    def looks(transform: TrainTransform, draws: list[tuple[int, int, int]]) -> list[bytes]:
        return [transform.pixels(image, draw).tobytes() for draw in draws]

    transforms = [TrainTransform(EvalTransform((11, 17)), name, seed=seed) for seed in range(10)]
    for place in range(3):
        draws = [tuple(number if other == place else 0 for other in range(3)) for number in range(10)]
        first = looks(transforms[0], draws)
        assert len(set(first)) > 6
        assert looks(transforms[0], draws[::-1]) == first[::-1]
    assert len({looks(transform, [(0, 0, 0)])[0] for transform in transforms}) > 6


# order and augmentation over workers, ranks, epochs and resumes


def two_epochs(data: ImageData) -> list:
    loader = data.train_dataloader()
    return [*batches(loader), *batches(loader)]


@pytest.fixture(scope="module")
def flawed(tmp_path_factory) -> Path:
    """A zip with an unreadable file in it, so that workers have something to report."""
    folder = make_tree(tmp_path_factory.mktemp("flawed") / "photos")
    (folder / "train" / "bee" / "03.png").write_bytes(b"")
    return make_zip(folder, folder.parent / "flawed.zip")


@pytest.fixture(scope="module")
def reference(flawed) -> list:
    return two_epochs(image_data(flawed, augment="strong"))


@pytest.mark.parametrize(
    "options",
    [
        {"num_workers": 1},
        {"num_workers": 2, "persistent_workers": True},
        {"num_workers": 2, "persistent_workers": False},
        {"num_workers": 1, "start_method": "spawn"},
    ],
    ids=str,
)
def test_workers_change_nothing(flawed, reference, options):
    data = image_data(flawed, augment="strong", **options)
    assert_same(two_epochs(data), reference)
    assert data.skipped == ["train/bee/03.png"]


def test_epochs_differ_in_order_and_augmentation(reference):
    half = len(reference) // 2
    assert [labels for _, labels in reference[:half]] != [labels for _, labels in reference[half:]]
    looks = [image.numpy().tobytes() for images, _ in reference for image in images]
    assert len(set(looks)) == len(looks)


def test_equal_files_are_augmented_differently(tmp_path):
    for name in CLASSES:
        (tmp_path / name).mkdir()
        for number in range(5):
            picture(0).save(tmp_path / name / f"{number}.png")
    seen = two_epochs(image_data(tmp_path, augment="light", batch_size=4))
    looks = [image.numpy().tobytes() for images, _ in seen for image in images]
    assert len(looks) == 24 and len(set(looks)) == 24


def test_set_epoch_gives_the_same_epoch(flawed, reference):
    loader = image_data(flawed, augment="strong").train_dataloader()
    loader.sampler.set_epoch(1)
    assert_same(batches(loader), reference[len(reference) // 2 :])


@pytest.mark.parametrize(("before", "after", "persistent"), [(0, 2, True), (2, 0, True), (2, 1, False)])
def test_resume_with_other_workers(flawed, reference, before, after, persistent):
    for given in (3, 4, 6):
        loader = image_data(flawed, augment="strong", num_workers=before).train_dataloader()
        taken = 0
        while taken < given:
            for _ in loader:
                taken += 1
                if taken == given:
                    state = loader.state_dict()
                    break
        resumed = image_data(
            flawed, augment="strong", num_workers=after, persistent_workers=persistent
        ).train_dataloader()
        resumed.load_state_dict(pickle.loads(pickle.dumps(state)))
        rest = reference[given : given + 2]
        assert_same([batch for batch, _ in zip(batches_of_two_epochs(resumed), rest, strict=False)], rest)


def batches_of_two_epochs(loader):
    for _ in range(2):
        yield from ((images, labels.tolist()) for images, labels in loader)


def test_an_epoch_begun_and_dropped_begins_again(flawed, reference):
    loader = image_data(flawed, augment="strong").train_dataloader()
    next(iter(loader))
    assert loader.state_dict() == {"epoch": 0, "position": 5}
    assert_same(batches(loader), reference[: len(reference) // 2])
    assert loader.state_dict() == {"epoch": 1, "position": 0}


@pytest.mark.parametrize("workers", [0, 2])
def test_global_random_state_is_left_alone(tree, workers):
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    data = image_data(tree, num_workers=workers, mean=None, std=None)
    for loader in (data.train_dataloader(), data.val_dataloader()):
        list(loader)
    torch.testing.assert_close(torch.rand(2), expected)


@pytest.mark.parametrize("world", [2, 3, 7])
def test_ranks_share_an_epoch_equally_and_augment_alike(tree, world, monkeypatch):
    whole = image_data(tree, augment="strong").train_dataloader()
    looks = {draw.index: whole.dataset[draw][0] for draw in whole.sampler}
    parts = []
    for rank in range(world):
        monkeypatch.setattr(data_module, "_place", lambda rank=rank: (rank, world))
        loader = image_data(tree, augment="strong").train_dataloader()
        parts.append(list(loader.sampler))
        for draw in parts[-1]:
            torch.testing.assert_close(loader.dataset[draw][0], looks[draw.index])
    assert {len(part) for part in parts} == {-(-23 // world)}
    order = [draw for step in zip(*parts, strict=True) for draw in step]
    whole.sampler.set_epoch(0)
    assert order[:23] == list(EpochSampler(23)) and order[23:] == order[: len(order) - 23]


@pytest.mark.parametrize("world", [1, 2, 3, 7])
def test_ranks_count_every_validation_image_once(tree, world, monkeypatch):
    seen = []
    for rank in range(world):
        monkeypatch.setattr(data_module, "_place", lambda rank=rank: (rank, world))
        seen += [image.numpy().tobytes() for images, _ in image_data(tree).val_dataloader() for image in images]
    assert len(seen) == len(set(seen)) == sum(COUNTS["val"])


def test_more_ranks_than_validation_images(tree, monkeypatch):
    monkeypatch.setattr(data_module, "_place", lambda: (0, 11))
    with pytest.raises(ValueError, match="val: 10 images cannot be shared by 11 processes"):
        image_data(tree).val_dataloader()


@pytest.mark.parametrize("world", [1, 3])
@pytest.mark.parametrize("start", [0, 6, 17])
def test_sampler_resumes_at_a_position(world, start):
    for rank in range(world):
        whole, rest = (EpochSampler(17, seed=5, rank=rank, world=world) for _ in range(2))
        whole.set_epoch(2)
        rest.epoch, rest.start = 2, start - start % world
        rest.set_epoch(2)
        assert list(rest) == list(whole)[start // world :]
        assert len(list(rest)) == len(whole)  # only the first pass is shortened


def test_balanced_draws_classes_equally_often(tmp_path):
    make_split(tmp_path, (20, 200, 40))
    data = image_data(tmp_path, balanced=True, seed=1)
    source, indices = data._part("train")
    sampler, counts = data.train_dataloader().sampler, Counter()
    for epoch in range(5):
        sampler.set_epoch(epoch)
        counts.update(source.labels[indices[draw.index]].item() for draw in sampler)
    total = sum(counts.values())
    assert all(abs(count / total - 1 / 3) < 0.05 for count in counts.values())
    draws = list(sampler)
    assert len(set(draws)) == len(draws)  # an image drawn twice is a second copy, augmented in its own way


def test_repeats_follow_each_other_as_copies():
    draws = list(EpochSampler(7, repeats=3))
    assert len(draws) == 7
    assert [draw.copy for draw in draws] == [0, 1, 2, 0, 1, 2, 0]
    assert len({draw.index for draw in draws[:3]}) == 1 and len({draw.index for draw in draws}) == 3


def test_last_batch_is_dropped_only_where_there_is_a_whole_one(tree):
    sizes = [[len(labels) for _, labels in image_data(tree, batch_size=b).train_dataloader()] for b in (5, 23, 50)]
    assert sizes == [[5, 5, 5, 5], [23], [23]]


class _ThreadCount:
    long_side = 8

    def apply(self, image, draw=None):
        return torch.tensor(cv2.getNumThreads())


def test_opencv_threads_are_off_in_workers_only(tree):
    before = cv2.getNumThreads()
    loader = image_data(tree, num_workers=1).train_dataloader()
    loader.dataset.transform = _ThreadCount()
    assert next(iter(loader))[0].max() <= 1
    assert cv2.getNumThreads() == before


# with Lightning


class _Probe(pl.LightningModule):
    """Remembers what each step saw, and saves a checkpoint wherever it is asked to."""

    def __init__(self, folder: Path | None = None):
        super().__init__()
        self.linear, self.folder, self.seen = torch.nn.Linear(3 * 11 * 17, 3), folder, {}

    def training_step(self, batch, number):
        images, labels = batch
        self.seen[self.global_step] = (self.current_epoch, labels.tolist(), images.double().sum().item())
        return cross_entropy(self.linear(images.flatten(1)), labels)

    def validation_step(self, batch, number):
        return None

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.01)

    def save(self, name: str) -> None:
        if self.folder is not None:
            self.trainer.save_checkpoint(self.folder / f"{name}-{self.global_step}.ckpt")

    def on_train_batch_end(self, *_):
        self.save("step")

    def on_train_epoch_end(self):
        self.save("epoch")

    def on_validation_end(self):
        self.save("val")


def fit(data: ImageData, tmp_path: Path, folder: Path | None = None, checkpoint: Path | None = None, **options):
    probe = _Probe(folder)
    trainer = pl.Trainer(
        max_epochs=3,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        default_root_dir=tmp_path,
        **options,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning's own: few workers, and names that torch has deprecated
        trainer.fit(probe, data, ckpt_path=checkpoint)
    return probe.seen


@pytest.mark.parametrize("options", [{}, {"limit_train_batches": 3}, {"val_check_interval": 2}], ids=str)
def test_lightning_resumes_with_the_batches_an_unbroken_run_sees(tree, tmp_path, options):
    unbroken = fit(image_data(tree), tmp_path, folder=tmp_path, **options)
    checkpoints = sorted(tmp_path.glob("*.ckpt"))
    assert {path.name.split("-")[0] for path in checkpoints} == {"step", "epoch", "val"}
    for path in checkpoints:
        done = int(path.stem.split("-")[1])
        resumed = fit(image_data(tree), tmp_path, checkpoint=path, **options)
        assert resumed == {step: seen for step, seen in unbroken.items() if step >= done}, path.name


def test_lightning_predicts_file_names(tree, tmp_path):
    class Names(_Probe):
        def predict_step(self, batch, number):
            return batch[1]

    data = ImageData(predict_root=str(tree / "val"), image_size=8, batch_size=3, num_workers=0, **HALF)
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, default_root_dir=tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        names = [name for batch in trainer.predict(Names(), data) for name in batch]
    assert names == sorted(path.relative_to(tree / "val").as_posix() for path in tree.glob("val/*/[0-9]*.png"))


def test_checkpoint_keeps_transform_and_refuses_other_classes(tree, tmp_path):
    state = image_data(tree, mean=None, std=None).state_dict()
    torch.save(state, tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    predicting = ImageData(predict_root=str(tree / "val"), image_size=(11, 17), num_workers=0)
    predicting.setup("predict")
    with pytest.raises(ValueError, match="no images for train"):
        predicting.predict_dataloader()
    predicting.load_state_dict(state)
    assert predicting.transform_config() == state["transform"] and predicting.classes == CLASSES
    assert image_data(tree).transform_config()["mean"] == [0.5, 0.5, 0.5]  # given, so not taken from anywhere
    other = image_data(tree)
    state["classes"] = ["ant", "bee", "dog"]
    with pytest.raises(ValueError, match=r"other classes: only there \['dog'\], only in root \['cat'\]"):
        other.load_state_dict(state)


# prediction


@pytest.mark.parametrize("kind", ["folder", "zip", "file"])
def test_predict_root(tree, archive, kind):
    root = {"folder": tree / "val" / "bee", "zip": archive, "file": tree / "val" / "bee" / "01.png"}[kind]
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


# torchvision


def write_mnist(folder: Path) -> None:
    folder.mkdir(parents=True)
    for part, count in (("train", 40), ("t10k", 7)):
        header = (0x803).to_bytes(4, "big") + b"".join(n.to_bytes(4, "big") for n in (count, 28, 28))
        (folder / f"{part}-images-idx3-ubyte").write_bytes(header + bytes(i % 251 for i in range(count * 784)))
        header = (0x801).to_bytes(4, "big") + count.to_bytes(4, "big")
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(header + bytes(i % 10 for i in range(count)))


def test_torchvision_data_set(tmp_path):
    write_mnist(tmp_path / "FashionMNIST" / "raw")
    data = ImageData(str(tmp_path), "fashion_mnist", image_size=14, num_workers=0, val_fraction=0.25, **HALF)
    data.prepare_data()
    data.setup("fit")
    assert data.num_classes == 10 and data.classes[9] == "Ankle boot" and data.class_counts == [3] * 10
    assert sum(len(labels) for _, labels in data.val_dataloader()) == 10
    assert sum(len(labels) for _, labels in data.test_dataloader()) == 7
    images, _ = next(iter(data.train_dataloader()))
    assert images.shape == (30, 3, 14, 14)


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "fashion_mnist", "mnist", "svhn", "food101", "oxford_pets"])
def test_torchvision_data_set_is_fetched_only_on_request(tmp_path, name):
    with pytest.raises(FileNotFoundError, match=f"'{name}' does not lie in root .*download: true"):
        ImageData(str(tmp_path), name).setup("fit")
    assert not list(tmp_path.rglob("*.*"))


# the embedded images and the set with known truth


def test_embedded_images():
    with zipfile.ZipFile(ASSETS / "writing_systems.zip") as packed:
        assert "Copyright (c) 2015 Brenden Lake" in packed.read("LICENSE").decode()
        assert {entry.date_time[0] for entry in packed.infolist()} == {1980}
    assert (ASSETS / "writing_systems.zip").stat().st_size < 1_200_000
    found = list_classes(ASSETS / "writing_systems.zip")
    assert found["train"].classes == ["Balinese", "Early_Aramaic", "Greek", "Korean", "Latin"]
    assert {split: len(images) for split, images in found.items()} == {"train": 2176, "val": 544}


def test_packing_gives_the_same_bytes(tree, tmp_path):
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
        assert image.size == size[::-1] and image.mode == "RGB" and mask.shape == size and label == index % 5
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
    data = ImageData(dataset="synthetic", image_size=(25, 31), num_workers=0, batch_size=100, augment="none", **HALF)
    data.setup("fit")
    assert data.classes == ["alpha", "theta", "xi", "phi", "omega"] and data.class_counts == [1200] * 5
    images, labels = next(iter(data.val_dataloader()))
    expected = PlacedCharacters("val", image_size=(25, 31))[3]
    pixels = ((images[3] * 0.25 + 0.5) * 255).round().permute(1, 2, 0).numpy().astype(np.uint8)
    assert (pixels == np.asarray(expected[0])).all() and labels[3] == expected[1]
    splits = [PlacedCharacters(split, length=5)[0][0].tobytes() for split in ("train", "val", "test")]
    assert len(set(splits)) == 3
    with pytest.raises(ValueError, match="split must be one of train, val, test"):
        PlacedCharacters("valid")
    with pytest.raises(IndexError):
        PlacedCharacters(length=5)[5]


def test_letters_differ_in_drawers_between_splits():
    train, val = PlacedCharacters("train", length=5), PlacedCharacters("val", length=5)
    assert [len(glyphs) for glyphs in train._letters] == [16] * 5 and [len(glyphs) for glyphs in val._letters] == [
        4
    ] * 5
    known = {glyph.tobytes() for glyphs in train._letters for glyph in glyphs}
    assert not any(glyph.tobytes() in known for glyphs in val._letters for glyph in glyphs)


# scale and manners


def test_names_are_stored_compactly():
    names = [f"train/n{number % 1000:08d}/image_{number:08d}.JPEG" for number in range(100_000)]
    packed = Names(names)
    assert len(packed) == 100_000 and packed[0] == names[0] and packed[99_999] == names[99_999]
    assert len(pickle.dumps(packed)) < 1.25 * sum(map(len, names))
    assert Names(["grüße/\udcff.png"])[0] == "grüße/\udcff.png"  # names that are not UTF-8 survive


@pytest.mark.slow
def test_a_hundred_thousand_files(tmp_path):
    pixel = png(Image.new("L", (1, 1)))
    for number in range(100):
        (tmp_path / f"class{number:02d}").mkdir()
        for other in range(1000):
            (tmp_path / f"class{number:02d}" / f"{other:04d}.png").write_bytes(pixel)
    data = image_data(tmp_path)
    assert sum(data.class_counts) == 85_000 and len(pickle.dumps(data._part("train")[0])) < 4_000_000


def test_the_transform_alone_imports_neither_lightning_nor_albumentations():
    code = (
        "import sys, visattn.data.transform, visattn.data.augment, visattn.data.images;"
        "print(sorted({'lightning', 'albumentations', 'torchvision', 'cv2'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "[]" and done.stderr == ""
