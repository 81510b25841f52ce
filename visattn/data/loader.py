"""Which images, in which order, on which process: sampler, data set, loaders; functions of seed, epoch and index."""

import time
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate


class Draw(NamedTuple):
    """What decides a sample's augmentation, beside the run's seed: its epoch, image, and how often it came before."""

    epoch: int
    index: int
    copy: int


class EpochSampler(Sampler[Draw]):
    """Training order as a pure function of (seed, epoch), cut into equal parts for the ranks.

    Args:
        length: number of images.
        seed: of the run.
        rank: this process.
        world: number of processes; each gets every ``world``-th sample, the last samples are filled
            up from the first.
        weights: per image, drawn in proportion and with replacement; None draws each image once.
        repeats: copies of an image that follow each other, each augmented in its own way (Hoffer et
            al. 2020); the epoch keeps its length, so it sees fewer images.

    Raises:
        ValueError: ``repeats`` is below 1.
    """

    def __init__(
        self,
        length: int,
        *,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
        weights=None,
        repeats: int = 1,
    ):
        if repeats < 1:
            raise ValueError(f"repeats must be 1 or more, got {repeats}")
        self.length, self.seed, self.rank, self.world, self.repeats = (
            length,
            seed,
            rank,
            world,
            repeats,
        )
        self.chances = None if weights is None else np.asarray(weights) / np.sum(weights)
        self.epoch, self.start = 0, 0

    def set_epoch(self, epoch: int) -> None:
        """Shuffle anew; Lightning calls this before every epoch, also before one that goes on after a resume."""
        if epoch != self.epoch:
            self.epoch, self.start = epoch, 0

    def __len__(self) -> int:
        return self.count(0)

    def count(self, start: int) -> int:
        """Samples of this rank from position ``start`` of the epoch on."""
        return max(0, -(-(self.length - start) // self.world))

    def __iter__(self) -> Iterator[Draw]:
        epoch, start, self.start = self.epoch, self.start, 0
        order = self._order(epoch)
        copies = (
            occurrence(order)
            if self.repeats > 1 or self.chances is not None
            else np.zeros_like(order)
        )
        mine = np.arange(start, start + self.count(start) * self.world, self.world) + self.rank
        mine %= self.length
        pairs = zip(order[mine].tolist(), copies[mine].tolist(), strict=True)
        return (Draw(epoch, index, copy) for index, copy in pairs)

    def _order(self, epoch: int) -> np.ndarray:
        generator = np.random.default_rng([self.seed, epoch])
        if self.chances is not None:
            order = generator.choice(self.length, self.length, p=self.chances)
        else:
            order = generator.permutation(self.length)
        return np.repeat(order, self.repeats)[: self.length]


def occurrence(order: np.ndarray) -> np.ndarray:
    """For each entry how many equal ones precede it."""
    by_value = np.argsort(order, kind="stable")
    values = order[by_value]
    first = np.searchsorted(values, values)
    result = np.empty_like(order)
    result[by_value] = np.arange(len(order)) - first
    return result


class ImageSet(Dataset):
    """Chosen images of a source, decoded and transformed one at a time.

    Args:
        source: any of ``visattn.data.sources.Source``.
        indices: which of its images; None takes all.
        transform: has ``apply(image)``, in training ``apply(image, draw)``, and ``long_side``, all
            it needs of a JPEG.
        on_error: ``raise``, or ``skip``: in training the next readable image takes the place,
            elsewhere there is none.
        named: samples are (image, file name) instead of (image, label).
    """

    def __init__(
        self, source, indices=None, *, transform=None, on_error: str = "skip", named: bool = False
    ):
        self.source, self.transform, self.on_error, self.named = source, transform, on_error, named
        self.indices = np.arange(len(source)) if indices is None else indices
        # in shared memory, so that workers can report to the main process
        self.unreadable = torch.zeros(len(self.indices), dtype=torch.uint8).share_memory_()

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, key: int | Draw) -> tuple[Tensor, int | str | Tensor] | None:
        if isinstance(key, int):
            return self._sample(key)
        for step in range(len(self)):
            position = (key.index + step) % len(self)
            sample = self._sample(position, Draw(key.epoch, position, key.copy + step))
            if sample is not None:
                return sample
        raise ValueError(
            f"none of {len(self)} images can be read, the first is {self.source.name(self.indices[0])!r}"
        )

    def _sample(
        self, position: int, draw: Draw | None = None
    ) -> tuple[Tensor, int | str | Tensor] | None:
        index = int(self.indices[position])
        try:
            image = self.source.image(index, self.transform.long_side)
        except ValueError:
            if self.on_error == "raise":
                raise
            self.unreadable[position] = 1
            return None
        inputs = (image,) if draw is None else (image, draw)
        return self.transform.apply(*inputs), self.source.name(
            index
        ) if self.named else self._label(index)

    def _label(self, index: int) -> int | Tensor:
        """Number of the class, or 0 and 1 for every class where there may be several."""
        label = self.source.labels[index]
        return torch.tensor(label, dtype=torch.float32) if label.ndim else int(label)

    def skipped(self) -> list[str]:
        """Names of the files that could not be read so far."""
        return [
            self.source.name(self.indices[position])
            for position in self.unreadable.nonzero().flatten().tolist()
        ]


def collate(samples: list) -> tuple | None:
    """Stack samples; unreadable ones are left out, and None stands for a batch in which all are."""
    readable = [sample for sample in samples if sample is not None]
    return tuple(default_collate(readable)) if readable else None


class EvalLoader(DataLoader):
    """A DataLoader that passes over batches of which no image can be read."""

    def __iter__(self):
        return (batch for batch in super().__iter__() if batch is not None)


class TrainLoader(DataLoader):
    """A DataLoader that can go on in the middle of an epoch, with any number of workers.

    Order and augmentation are pure functions, so its whole state is where it stands: the epoch and
    how many samples of it all processes together have been given. (torchdata's StatefulDataLoader
    saves the state of its workers, and refuses to resume with another number of them.) Needs an
    EpochSampler.
    """

    waited = 0.0  # seconds in which batches were awaited, or made in this process, in the epoch begun last
    _stand: tuple[int, int] | None = None

    def __iter__(self):
        sampler, start = self.sampler, self.sampler.start
        epoch, step = sampler.epoch, self.batch_size * sampler.world
        batches, rest = divmod(sampler.count(start), self.batch_size)
        batches += bool(rest and not self.drop_last)
        for number, batch in enumerate(self._timed(), 1):
            # moved on before the batch is given out: what is saved while it is used resumes after
            # it
            self._stand = (epoch, start + number * step) if number < batches else (epoch + 1, 0)
            if number == batches:
                sampler.set_epoch(epoch + 1)
            yield batch

    def _timed(self) -> Iterator:
        self.waited, start = 0.0, time.perf_counter()
        batches = super().__iter__()
        while (batch := next(batches, None)) is not None:
            self.waited += time.perf_counter() - start
            yield batch
            start = time.perf_counter()

    def state_dict(self) -> dict[str, int]:
        epoch, position = self._stand or (self.sampler.epoch, self.sampler.start)
        return {"epoch": epoch, "position": position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.sampler.epoch, self.sampler.start = state["epoch"], state["position"]
        self._stand = state["epoch"], state["position"]


def start_worker(number: int) -> None:
    """OpenCV's own threads in every worker would fight over the cores."""
    import cv2

    cv2.setNumThreads(0)
