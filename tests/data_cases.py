"""Folders of pictures for the tests of data: sound, odd and broken ones; wrong calls with what they must say."""

import io
import struct
import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from visattn.data.module import ImageData

CLASSES = ["ant", "bee", "cat"]
COUNTS = {"train": (5, 7, 11), "val": (2, 3, 5)}
HALF = {"mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25)}


def picture(number: int, size: tuple[int, int] = (19, 13)) -> Image.Image:
    """Smooth colors that differ from number to number."""
    values = np.random.default_rng(number).integers(0, 256, (3, 3, 3), dtype=np.uint8)
    return Image.fromarray(values).resize(size, Image.Resampling.BICUBIC)


def make_split(folder: Path, counts: tuple[int, ...], start: int = 0) -> int:
    for name, count in zip(CLASSES, counts, strict=True):
        (folder / name).mkdir(parents=True)
        for number in range(count):
            picture(start).save(folder / name / f"{number:02d}.png")
            start += 1
    return start


def make_tree(folder: Path) -> Path:
    """train/ and val/ of three classes, with what operating systems leave behind."""
    start = make_split(folder / "train", COUNTS["train"])
    make_split(folder / "val", COUNTS["val"], start)
    for junk in (
        ".DS_Store",
        "train/.DS_Store",
        "train/ant/._00.png",
        "train/ant/Thumbs.db",
        "val/bee/desktop.ini",
    ):
        (folder / junk).write_bytes(b"junk")
    (folder / "__MACOSX" / "train" / "ant").mkdir(parents=True)
    (folder / "__MACOSX" / "train" / "ant" / "00.png").write_bytes(b"junk")
    return folder


def make_zip(
    folder: Path, target: Path, prefix: str = "", compression: int = zipfile.ZIP_DEFLATED
) -> Path:
    with zipfile.ZipFile(target, "w", compression) as archive:
        for path in sorted(folder.rglob("*")):
            archive.write(path, prefix + path.relative_to(folder).as_posix())
    return target


def image_data(root, **options) -> ImageData:
    """Small images of a root, set up to train."""
    settings = {"image_size": (11, 17), "batch_size": 5, "num_workers": 0, **HALF} | options
    data = ImageData(str(root), **settings)
    data.setup("fit")
    return data


def batches(loader) -> list[tuple[torch.Tensor, list[int]]]:
    """What a loader gives, labels as numbers."""
    return [(images, labels.tolist()) for images, labels in loader]


def assert_same(left, right) -> None:
    assert [labels for _, labels in left] == [labels for _, labels in right]
    for (images, _), (others, _) in zip(left, right, strict=True):
        torch.testing.assert_close(images, others, rtol=0, atol=0)


def png(image: Image.Image, **options) -> bytes:
    return encoded(image, "PNG", **options)


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def _two_tone(mode: str, left, right) -> Image.Image:
    image = Image.new(mode, (14, 14), right)
    image.paste(left, (0, 0, 7, 14))
    return image


def _sixteen_bit(left: int, right: int) -> Image.Image:
    values = np.full((14, 14), right, dtype=np.uint16)
    values[:, :7] = left
    return Image.fromarray(values)


def _palette(transparent: int | None) -> bytes:
    image = Image.new("P", (14, 14), 1)
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.paste(0, (0, 0, 7, 14))
    return png(image) if transparent is None else png(image, transparency=transparent)


def _rotated() -> bytes:
    """Red in the upper left quarter when shown; stored lying on its side, as a phone does (EXIF orientation 6)."""
    upright = Image.new("RGB", (14, 14), (0, 0, 255))
    upright.paste((255, 0, 0), (0, 0, 7, 7))
    exif = Image.Exif()
    exif[0x0112] = 6
    return png(upright.transpose(Image.Transpose.ROTATE_90), exif=exif)


def _float(left: float, right: float) -> bytes:
    values = np.full((14, 14), right, dtype=np.float32)
    values[:, :7] = left
    return encoded(Image.fromarray(values), "TIFF")


# name: (file, RGB in the upper left quarter, RGB in the lower right quarter)
ODD = {
    "grey.png": (png(_two_tone("L", 10, 200)), (10, 10, 10), (200, 200, 200)),
    "bits.png": (png(_two_tone("1", 0, 1)), (0, 0, 0), (255, 255, 255)),
    "grey_alpha.png": (png(_two_tone("LA", (10, 0), (200, 255))), (255, 255, 255), (200, 200, 200)),
    "rgba.png": (png(_two_tone("RGBA", (9, 9, 9, 0), (1, 2, 3, 255))), (255, 255, 255), (1, 2, 3)),
    "half_clear.png": (
        png(_two_tone("RGBA", (0, 0, 0, 51), (1, 2, 3, 255))),
        (204, 204, 204),
        (1, 2, 3),
    ),
    "palette.png": (_palette(None), (10, 20, 30), (200, 100, 50)),
    "palette_clear.png": (_palette(0), (255, 255, 255), (200, 100, 50)),
    "cmyk.tif": (
        encoded(_two_tone("CMYK", (255, 0, 0, 0), (0, 0, 0, 255)), "TIFF"),
        (0, 255, 255),
        (0, 0, 0),
    ),
    "sixteen.png": (png(_sixteen_bit(257 * 10, 257 * 200)), (10, 10, 10), (200, 200, 200)),
    "sixteen.tif": (
        encoded(_sixteen_bit(257 * 10, 257 * 200), "TIFF"),
        (10, 10, 10),
        (200, 200, 200),
    ),
    "float.tif": (_float(0.2, 0.8), (51, 51, 51), (204, 204, 204)),
    "lab.tif": (
        encoded(Image.new("LAB", (14, 14), (255, 128, 128)), "TIFF"),
        (255, 255, 255),
        (255, 255, 255),
    ),
    "rotated.png": (_rotated(), (255, 0, 0), (0, 0, 255)),
    "one_pixel.png": (png(Image.new("RGB", (1, 1), (7, 8, 9))), (7, 8, 9), (7, 8, 9)),
    "moving.gif": (
        encoded(_two_tone("L", 0, 255), "GIF", save_all=True),
        (0, 0, 0),
        (255, 255, 255),
    ),
    "upper.PNG": (png(_two_tone("L", 10, 200)), (10, 10, 10), (200, 200, 200)),
}


def bomb() -> bytes:
    """A PNG of a few bytes that claims 60000 x 60000 pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


# name: (file, part of what the error must say)
BROKEN = {
    "empty.png": (b"", "empty or not an image"),
    "text.jpg": (b"Dear diary, today I am not a picture.", "empty or not an image"),
    "cut.jpg": (encoded(picture(0, (640, 480)), "JPEG")[:-4000], "truncated"),
    "cut.png": (png(picture(0, (640, 480)))[:3000], "truncated"),
    "garbled.png": (png(picture(0))[:50] + b"\0" * 40 + png(picture(0))[90:], ""),
    "bomb.png": (bomb(), "pixels"),
}


def _nothing(folder: Path) -> None:
    folder.mkdir()


def _one_class(folder: Path) -> None:
    (folder / "ant").mkdir(parents=True)
    picture(0).save(folder / "ant" / "0.png")


def _loose(folder: Path) -> None:
    folder.mkdir()
    picture(0).save(folder / "0.png")


def _zipped(folder: Path) -> None:
    folder.mkdir()
    for name in ("train.zip", "test.zip"):
        (folder / name).write_bytes(b"")


def _empty_class(folder: Path) -> None:
    make_split(folder, COUNTS["train"])
    (folder / "dog").mkdir()


def _mismatch(folder: Path) -> None:
    make_tree(folder)
    (folder / "val" / "cat").rename(folder / "val" / "dog")


def _no_train(folder: Path) -> None:
    make_split(folder / "val", COUNTS["val"])


def _unsorted(folder: Path) -> None:
    for split in ("train", "val"):
        (folder / split).mkdir(parents=True)
        picture(0).save(folder / split / "0.png")


def _not_a_zip(folder: Path) -> None:
    folder.write_bytes(b"not a zip")


# (what lies at root, further arguments, error, what it must say)
REFUSALS = [
    (None, {}, FileNotFoundError, r"root: there is no folder or zip file .*photos"),
    (_nothing, {}, ValueError, r"root: .*photos.* at least two class folders.*got none"),
    (_loose, {}, ValueError, r"got none and 1 files outside"),
    (_one_class, {}, ValueError, r"at least two class folders.*got \['ant'\]"),
    (_zipped, {}, ValueError, r"got none; unzip test\.zip, train\.zip there, or name one of them"),
    (_empty_class, {}, ValueError, r"class folders without an image: dog"),
    (_mismatch, {}, ValueError, r"only in train/ \['cat'\], only in val/ \['dog'\]"),
    (_no_train, {}, ValueError, r"has \['val'\] but no train/"),
    (_unsorted, {}, ValueError, r"has \['train', 'val'\] but no train/ with class folders in it"),
    (_not_a_zip, {}, ValueError, r"photos' is not a readable zip"),
    (make_tree, {"augment": "strnog"}, ValueError, r"augment must be one of .*strong.*'strnog'"),
    (
        make_tree,
        {"resize": "squash"},
        ValueError,
        r"resize must be one of cover, stretch, got 'squash'",
    ),
    (make_tree, {"dataset": "cifar_10"}, ValueError, r"did you mean 'cifar10'"),
    (make_tree, {"dataset": "imagenet"}, ValueError, r"known: cifar10"),
    (
        make_tree,
        {"on_error": "ignore"},
        ValueError,
        r"on_error must be skip or raise, got 'ignore'",
    ),
    (make_tree, {"image_size": 0}, ValueError, r"image_size=\(0, 0\)"),
    (make_tree, {"batch_size": 0}, ValueError, r"batch_size=0"),
    (make_tree, {"std": None}, ValueError, r"both mean and std"),
    (make_tree, {"mean": (0.5,), "std": (0.5,)}, ValueError, r"three numbers each"),
    (make_tree, {"mean": (0.5,) * 3, "std": (0.5, 0.5, 0)}, ValueError, r"std positive"),
    (make_tree, {"erase": 1.5}, ValueError, r"erase must lie between 0 and 1, got 1\.5"),
    (make_tree, {"repeats": 0}, ValueError, r"repeats must be 1 or more, got 0"),
    (make_tree, {"dataset": "synthetic", "image_size": 24}, ValueError, r"archive: .*Greek"),
    (make_tree, {"dataset": "synthetic", "image_size": 16}, ValueError, r"at least 24 x 24"),
]

# name in SOURCE_TYPES: the arguments that select it
SOURCE_ARGUMENTS = {
    "torchvision": {"dataset": "cifar10"},
    "synthetic": {"dataset": "synthetic"},
    "Hugging Face": {"dataset": "hf:mnist"},
    "CSV labels": {"root": "photos", "labels": "labels.csv"},
    "tar shards by URL": {"root": "https://a.org/train-{0..3}.tar"},
    "tar shards": {"root": "train.tar"},
    "folder or zip of class folders": {"root": "photos"},
}
