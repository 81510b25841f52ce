"""`visattn bench data`: how fast one core reads and augments photographs, and what a folder of many files costs."""

import io
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import cv2
from PIL import Image
from rich import print

from visattn.bench.timing import extra_memory, measure, table
from visattn.data.augment import AUGMENTS, TrainTransform
from visattn.data.decode import read_image
from visattn.data.images import list_images
from visattn.data.module import ImageData
from visattn.data.transform import EvalTransform

LONG_SIDE, QUALITY = 500, 90  # about what the photographs of ImageNet have


def run(
    *,
    photos: str = "assets/photos",
    image_size: int = 224,
    repeats: int = 9,
    files: int = 100_000,
    classes: int = 1000,
) -> None:
    """Print images per second of one core for every augmentation, then time and memory of listing many files.

    Args:
        photos: Folder of photographs; they are stored anew as JPEG with a longer side of 500
            pixels.
        image_size: Side of the images given out.
        repeats: Measurements of each, taken in turns; the median counts.
        files: Tiny files to generate and list; 0 leaves that out.
        classes: Class folders they lie in.
    """
    cv2.setNumThreads(0)
    print(f"\nOne core, {image_size} px, from JPEG files with a longer side of {LONG_SIDE} px\n")
    print(_reading(photos, image_size, repeats))
    if files:
        print(f"\n{files:,} files in {classes:,} class folders\n")
        print(_listing(files, classes))


def _reading(photos: str, image_size: int, repeats: int) -> str:
    stored = _stored(photos)
    evaluation = EvalTransform((image_size, image_size))
    ways: dict[str, Callable] = {
        "decode alone": lambda data, _: read_image(data, "", evaluation.long_side)
    }
    ways["validation"] = lambda data, _: evaluation.apply(
        read_image(data, "", evaluation.long_side)
    )
    for name in AUGMENTS[1:]:
        ways[name] = partial(_augmented, TrainTransform(evaluation, name, flip=True))
    timings = measure(
        {name: partial(_all, way, stored) for name, way in ways.items()}, repeats=repeats
    )
    rows = [(name, *_rates(timing, len(stored))) for name, timing in timings.items()]
    return table(("augment", "images/s", "slowest to fastest"), rows)


def _augmented(transform: TrainTransform, data: bytes, index: int) -> object:
    return transform.apply(read_image(data, "", transform.long_side), (0, index, 0))


def _all(way: Callable, stored: list[bytes]) -> None:
    for index, data in enumerate(stored):
        way(data, index)


def _rates(timing, count: int) -> tuple[str, str]:
    rate, low, high = (1000 * count / time for time in (timing.median, timing.high, timing.low))
    return f"{rate:.0f}", f"{low:.0f}-{high:.0f}"


def _stored(photos: str) -> list[bytes]:
    """The photographs as files of the size that data sets have, each several times."""
    source, stored = list_images(photos, "photos"), []
    for index in range(len(source)):
        image = source.image(index).convert("RGB")
        image.thumbnail((LONG_SIDE, LONG_SIDE))
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=QUALITY)
        stored.append(buffer.getvalue())
    return stored * max(1, 40 // len(stored))


def _listing(files: int, classes: int) -> str:
    with tempfile.TemporaryDirectory() as folder:
        _make_files(Path(folder), files, classes)
        clock, processor = time.perf_counter(), time.process_time()
        begin(folder)()
        seconds, busy = time.perf_counter() - clock, time.process_time() - processor
        rows = [
            (
                f"{files:,}",
                f"{seconds:.2f}",
                f"{busy:.2f}",
                f"{extra_memory(partial(begin, folder)):.0f}",
            )
        ]
    return table(("files", "s until the first batch", "of it processor", "MiB more"), rows)


def begin(root: str) -> Callable[[], object]:
    """A function that lists a folder of class folders, splits it and gives the first batch, in this process."""

    def work() -> object:
        data = ImageData(root, image_size=32, batch_size=32, num_workers=0, augment="none")
        data.setup("fit")
        return next(iter(data.train_dataloader()))

    return work


def _make_files(folder: Path, files: int, classes: int) -> None:
    buffer = io.BytesIO()
    Image.new("L", (1, 1)).save(buffer, "PNG")
    for label in range(classes):
        (folder / f"n{label:08d}").mkdir()
        for number in range(label, files, classes):
            (folder / f"n{label:08d}" / f"n{label:08d}_{number}.png").write_bytes(buffer.getvalue())
