"""Data set and loaders: images decoded and transformed, batches that a resume can go on with."""

import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from visattn.data.augment import TrainTransform
from visattn.data.sampler import Draw, EpochSampler
from visattn.data.source import ImageSource
from visattn.data.transform import EvalTransform

Sample = tuple[Tensor, int | str | Tensor]


class ImageSet(Dataset):
    """Some images of a source, decoded and transformed one at a time.

    Args:
        source: any source of images.
        indices: which of its images; None takes all.
        transform: has ``apply(image)``, in training ``apply(image, draw)``, and ``long_side``, the
            size that it needs of a JPEG.
        on_error: ``raise``, or ``skip``: in training the next readable image takes the place,
            elsewhere there is none.
        named: samples are (image, file name) instead of (image, label).
    """

    def __init__(
        self,
        source: ImageSource,
        indices: np.ndarray | None = None,
        *,
        transform: EvalTransform | TrainTransform | None = None,
        on_error: str = "skip",
        named: bool = False,
    ):
        self.source = source
        self.transform: Any = transform
        self.on_error = on_error
        self.named = named
        self.indices = np.arange(len(source)) if indices is None else indices
        # in shared memory, so that workers can report to the main process
        unreadable = torch.zeros(len(self.indices), dtype=torch.uint8)
        self.unreadable = unreadable.share_memory_()

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, key: int | Draw) -> Sample | None:
        if isinstance(key, int):
            return self._sample(key)
        # the next image takes the place of an unreadable one
        for step in range(len(self)):
            position = (key.index + step) % len(self)
            draw = Draw(key.epoch, position, key.copy + step)
            sample = self._sample(position, draw)
            if sample is not None:
                return sample
        first = self.source.name(self.indices[0])
        raise ValueError(f"none of {len(self)} images can be read, the first is {first!r}")

    def _sample(self, position: int, draw: Draw | None = None) -> Sample | None:
        index = int(self.indices[position])
        try:
            image = self.source.image(index, self.transform.long_side)
        except ValueError:
            if self.on_error == "raise":
                raise
            self.unreadable[position] = 1
            return None
        if draw is None:
            pixels = self.transform.apply(image)
        else:
            pixels = self.transform.apply(image, draw)
        if self.named:
            return pixels, self.source.name(index)
        return pixels, self._label(index)

    def _label(self, index: int) -> int | Tensor:
        """The class number, or (C,) of 0 and 1 where an image may have several classes."""
        label = self.source.labels[index]
        if label.ndim:
            return torch.tensor(label, dtype=torch.float32)
        return int(label)

    def skipped(self) -> list[str]:
        """Names of the files that could not be read so far."""
        indices = self.indices[self.unreadable.numpy() > 0]
        return [self.source.name(index) for index in indices]


def collate(samples: list[Sample | None]) -> tuple | None:
    """Stack samples without the unreadable ones; None stands for a batch in which all are."""
    readable = [sample for sample in samples if sample is not None]
    if not readable:
        return None
    return tuple(default_collate(readable))


class EvalLoader(DataLoader):
    """A DataLoader that omits batches of which no image can be read."""

    def __iter__(self):
        return (batch for batch in super().__iter__() if batch is not None)


class TrainLoader(DataLoader):
    """A DataLoader that can go on in the middle of an epoch, with any number of workers.

    Order and augmentation are pure functions, so its whole state is its position: the epoch, and
    how many samples of it all processes together have yielded. (torchdata's StatefulDataLoader
    saves the state of its workers, and refuses to resume with another number of them.) Needs an
    EpochSampler.
    """

    # seconds in which batches were awaited, or made in this process, in the latest epoch
    waited = 0.0
    sampler: EpochSampler
    _position: tuple[int, int] | None = None  # epoch and samples

    def __iter__(self):
        sampler = self.sampler
        start = sampler.start
        epoch = sampler.epoch
        assert self.batch_size is not None, "ImageData gives a batch size"
        samples_per_batch = self.batch_size * sampler.world  # over all processes
        num_batches, remainder = divmod(sampler.count(start), self.batch_size)
        if remainder and not self.drop_last:
            num_batches += 1
        for number, batch in enumerate(self._timed_batches(), 1):
            # updated before the batch is yielded: what is saved while it is used resumes after it
            if number < num_batches:
                self._position = (epoch, start + number * samples_per_batch)
            else:
                self._position = (epoch + 1, 0)
            if number == num_batches:
                sampler.set_epoch(epoch + 1)
            yield batch

    def _timed_batches(self) -> Iterator:
        self.waited = 0.0
        start = time.perf_counter()
        batches = super().__iter__()
        while (batch := next(batches, None)) is not None:
            self.waited += time.perf_counter() - start
            yield batch
            start = time.perf_counter()

    def state_dict(self) -> dict[str, int]:
        """Epoch and position in it."""
        epoch = self.sampler.epoch
        position = self.sampler.start
        if self._position is not None:  # a batch was yielded
            epoch, position = self._position
        return {"epoch": epoch, "position": position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on where another loader was."""
        self.sampler.epoch = state["epoch"]
        self.sampler.start = state["position"]
        self._position = (state["epoch"], state["position"])


def start_worker(number: int) -> None:
    """Turn off OpenCV's threads, which in every worker would compete for the cores."""
    import cv2

    cv2.setNumThreads(0)
