"""Augmentation: a pure function of image, seed, epoch, index and copy, at any size."""

from pathlib import Path

import numpy as np
import pytest
import torch
from data_cases import image_data, make_tree, picture

from visattn.data.augment import AUGMENTS, TrainTransform
from visattn.data.transform import EvalTransform, build_transform


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    return make_tree(tmp_path_factory.mktemp("data") / "photos")


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
