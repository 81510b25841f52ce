"""Augmentation: a pure function of image, seed, epoch, index and copy, at any size."""

from pathlib import Path

import numpy as np
import pytest
import torch
from data_cases import image_data, make_tree, picture
from PIL import Image

from visattn.data.augment import AUGMENTS, TrainTransform, random_box
from visattn.data.transform import EvalTransform, build_transform


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    return make_tree(tmp_path_factory.mktemp("data") / "photos")


def test_none_augments_nothing(tree):
    data = image_data(tree, augment="none", batch_size=1)
    source, indices = data.split("train")
    transform = build_transform(data.transform_config())
    for draw, (images, _) in zip(
        data.train_dataloader().sampler, data.train_dataloader(), strict=True
    ):
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
        assert (
            tensor.shape == (3, 11, 17)
            and tensor.dtype == torch.float32
            and tensor.isfinite().all()
        )
    assert image.tobytes() == before


def test_flip_mirrors_half_of_the_images_and_only_on_request():
    image = picture(1, (17, 11))
    pixels = np.asarray(image)
    mirrored = [
        (
            TrainTransform(EvalTransform((11, 17)), "none", flip=flip).pixels(image, (0, i, 0))
            != pixels
        ).any()
        for flip in (True, False)
        for i in range(200)
    ]
    assert 70 < sum(mirrored[:200]) < 130 and not any(mirrored[200:])


@pytest.mark.parametrize("name", ["crop", "light", "strong", "trivial"])
def test_augmentation_depends_on_seed_epoch_index_and_copy(name):
    image = picture(2, (40, 30))

    def looks(transform: TrainTransform, draws: list[tuple[int, int, int]]) -> list[bytes]:
        return [transform.pixels(image, draw).tobytes() for draw in draws]

    transforms = [TrainTransform(EvalTransform((11, 17)), name, seed=seed) for seed in range(10)]
    for place in range(3):
        draws = [
            tuple(number if other == place else 0 for other in range(3)) for number in range(10)
        ]
        first = looks(transforms[0], draws)
        assert len(set(first)) > 6
        assert looks(transforms[0], draws[::-1]) == first[::-1]
    assert len({looks(transform, [(0, 0, 0)])[0] for transform in transforms}) > 6


def test_crop_moves_by_an_eighth_at_most_and_repeats_the_edge():
    pixels = np.asarray(picture(3, (24, 16)))
    padded = np.pad(pixels, ((2, 2), (3, 3), (0, 0)), mode="edge")
    parts = {padded[y : y + 16, x : x + 24].tobytes(): (y, x) for y in range(5) for x in range(7)}
    transform = TrainTransform(EvalTransform((16, 24)), "crop")
    seen = {
        parts.get(transform.pixels(Image.fromarray(pixels), (0, i, 0)).tobytes())
        for i in range(500)
    }
    assert seen == set(parts.values())


@pytest.mark.parametrize(
    ("name", "erase", "share"), [("none", 0.5, 0.5), ("light", 1.0, 1.0), ("strong", 0.0, 0.0)]
)
def test_erasing_hits_the_share_asked_for(name, erase, share):
    image = Image.new(
        "RGB", (34, 22), (90, 120, 150)
    )  # one color: moving it changes nothing, only erasing does
    transform = TrainTransform(EvalTransform((11, 17)), name, erase=erase)
    counts = [
        len(np.unique(transform.pixels(image, (0, i, 0)).reshape(-1, 3), axis=0))
        for i in range(100)
    ]
    assert abs(np.mean([count > 1 for count in counts]) - share) <= (0.15 if 0 < share < 1 else 0)


def test_strong_erases_a_quarter_unless_told_otherwise():
    assert [TrainTransform(EvalTransform((5, 7)), name).erase for name in AUGMENTS] == [
        0,
        0,
        0,
        0.25,
        0,
    ]
    with pytest.raises(ValueError, match=r"erase must lie between 0 and 1, got 1\.5"):
        TrainTransform(EvalTransform((5, 7)), erase=1.5)


@pytest.mark.parametrize("resize", ["cover", "stretch"])
@pytest.mark.parametrize("name", AUGMENTS)
def test_masks_move_as_their_images(name, resize):
    """A picture that is its own mask stays so: bright exactly where the mask is set, as far as resizing keeps edges."""
    values = np.zeros((60, 90), np.uint8)
    values[20:45, 30:75] = 7
    mask = Image.fromarray(values)
    image = Image.fromarray(np.where(values > 0, 255, 0).astype(np.uint8))
    plain = EvalTransform((32, 48), resize=resize, mean=(0, 0, 0), std=(1, 1, 1))
    transform = TrainTransform(plain, name, flip=True, erase=0.0)
    agreement, places = [], set()
    for index in range(30):
        pixels, moved = transform.pair(image, mask, (0, index, 0))
        assert (
            moved.shape == (32, 48)
            and moved.dtype == torch.uint8
            and set(moved.unique().tolist()) <= {0, 7}
        )
        shown = pixels[0] > (pixels.max() + pixels.min()) / 2
        agreement.append((shown == (moved == 7)).float().mean().item())
        places.add(moved.numpy().tobytes())
    agreement.sort()
    assert (
        agreement[15] > 0.95 and len(places) > 1
    )  # operations such as solarize may exchange bright and dark


def test_masks_under_evaluation_and_erasing():
    values = np.full((40, 40), 3, np.uint8)
    image, mask = picture(0, (40, 40)), Image.fromarray(values)
    pixels, kept = EvalTransform((11, 17)).pair(image, mask)
    assert pixels.shape == (3, 11, 17) and kept.shape == (11, 17) and (kept == 3).all()
    _, kept = TrainTransform(EvalTransform((11, 17)), "none", erase=1.0).pair(
        image, mask, (0, 0, 0)
    )
    assert (kept == 3).all()  # what is hidden is still there


def test_pair_gives_the_image_that_apply_gives():
    image, mask = picture(3, (40, 30)), Image.new("L", (40, 30))
    transform = TrainTransform(EvalTransform((11, 17)), "strong", seed=4)
    for index in range(10):
        pixels, _ = transform.pair(image, mask, (2, index, 1))
        torch.testing.assert_close(pixels, transform.apply(image, (2, index, 1)), rtol=0, atol=0)


@pytest.mark.parametrize("size", [(1, 5000), (5000, 1), (31, 17), (17, 17), (1, 1), (640, 480)])
@pytest.mark.parametrize("aspect", [1.0, 0.25, 17 / 11])
def test_boxes_lie_inside_and_have_their_aspect(size, aspect):
    generator = np.random.default_rng(0)
    places = set()
    for resized in (False, True):
        for _ in range(50):
            left, top, right, bottom = random_box(size, aspect, resized, generator)
            assert 0 <= left < right <= size[0] and 0 <= top < bottom <= size[1]
            ratio = (right - left) / (bottom - top) / aspect
            assert 0.74 < ratio < 1.34 if resized else ratio == pytest.approx(1)
            touches = right - left == pytest.approx(size[0]) or bottom - top == pytest.approx(
                size[1]
            )
            assert touches or (
                resized and (right - left) * (bottom - top) > 0.349 * size[0] * size[1]
            )
            places.add((left, top))
    assert len(places) > 40
