"""Loaders: order and augmentation over workers, ranks, epochs and resumes."""

import pickle
from collections import Counter
from pathlib import Path

import cv2
import pytest
import torch
from data_cases import (
    CLASSES,
    COUNTS,
    assert_same,
    batches,
    image_data,
    make_split,
    make_tree,
    make_zip,
    picture,
)

from visattn.data import module as data_module
from visattn.data.module import ImageData
from visattn.data.sampler import EpochSampler
from visattn.data.transform import build_transform


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    return make_tree(tmp_path_factory.mktemp("data") / "photos")


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
        {"num_workers": 0, "cache": True},
        {"num_workers": 2, "cache": True},
        {"num_workers": 1, "cache": True, "start_method": "spawn"},
    ],
    ids=str,
)
def test_workers_and_cache_change_nothing(flawed, reference, options):
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


@pytest.mark.parametrize(
    ("before", "after", "persistent"), [(0, 2, True), (2, 0, True), (2, 1, False)]
)
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
        assert_same(
            [batch for batch, _ in zip(batches_of_two_epochs(resumed), rest, strict=False)], rest
        )


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
        monkeypatch.setattr(data_module, "rank_and_world", lambda rank=rank: (rank, world))
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
        monkeypatch.setattr(data_module, "rank_and_world", lambda rank=rank: (rank, world))
        seen += [
            image.numpy().tobytes()
            for images, _ in image_data(tree).val_dataloader()
            for image in images
        ]
    assert len(seen) == len(set(seen)) == sum(COUNTS["val"])


def test_more_ranks_than_validation_images(tree, monkeypatch):
    monkeypatch.setattr(data_module, "rank_and_world", lambda: (0, 11))
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
    source, indices = data.split("train")
    sampler, counts = data.train_dataloader().sampler, Counter()
    for epoch in range(5):
        sampler.set_epoch(epoch)
        counts.update(source.labels[indices[draw.index]].item() for draw in sampler)
    total = sum(counts.values())
    assert all(abs(count / total - 1 / 3) < 0.05 for count in counts.values())
    draws = list(sampler)
    assert len(set(draws)) == len(
        draws
    )  # an image drawn twice is a second copy, augmented in its own way


def test_repeats_follow_each_other_as_copies():
    draws = list(EpochSampler(7, repeats=3))
    assert len(draws) == 7
    assert [draw.copy for draw in draws] == [0, 1, 2, 0, 1, 2, 0]
    assert len({draw.index for draw in draws[:3]}) == 1 and len({draw.index for draw in draws}) == 3


def test_last_batch_is_dropped_only_where_there_is_a_whole_one(tree):
    sizes = [
        [len(labels) for _, labels in image_data(tree, batch_size=b).train_dataloader()]
        for b in (5, 23, 50)
    ]
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


def test_another_look_at_the_training_images_leaves_the_training_alone(flawed, reference):
    data = image_data(flawed, augment="strong", batch_size=5)
    loader = data.train_dataloader()
    images, _ = next(iter(data.ordered_dataloader("train")))
    torch.testing.assert_close(
        images[0], build_transform(data.transform_config())(data.split("train")[0].image(0))
    )
    assert_same(batches(loader), reference[: len(reference) // 2])
    assert data.skipped == ["train/bee/03.png"]


def test_the_loader_counts_what_it_waits(tree, monkeypatch):
    clock = iter(range(1000))
    monkeypatch.setattr("visattn.data.loader.time.perf_counter", lambda: next(clock))
    loader = image_data(tree).train_dataloader()
    for _ in range(2):
        count = len(list(loader))
        assert loader.waited == count  # one second each
