"""Which image comes when, on which process: the training order as a function of seed and epoch."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch.distributed
from torch.utils.data import Sampler


class Draw(NamedTuple):
    """What decides a sample's augmentation, besides the run's seed.

    ``copy`` counts how often the image came before in the epoch.
    """

    epoch: int
    index: int  # type: ignore[assignment]  # hides tuple.index, which no one calls
    copy: int


class EpochSampler(Sampler[Draw]):
    """Training order as a pure function of (seed, epoch), cut into equal parts for the ranks.

    Args:
        length: number of images.
        seed: of the run.
        rank: this process.
        world: number of processes; each gets every ``world``-th sample, and the first samples come
            again where the last do not suffice for all.
        weights: per image, drawn in proportion and with replacement; None draws each image once.
        repeats: copies of an image that follow each other, each augmented in its own way (Hoffer et
            al. 2020); the epoch keeps its length, so it uses fewer images.

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
        weights: Sequence[float] | np.ndarray | None = None,
        repeats: int = 1,
    ):
        if repeats < 1:
            raise ValueError(f"repeats must be 1 or more, got {repeats}")
        self.length = length
        self.seed = seed
        self.rank = rank
        self.world = world
        self.repeats = repeats
        self.probabilities: np.ndarray | None = None
        if weights is not None:
            self.probabilities = np.asarray(weights) / np.sum(weights)
        self.epoch = 0
        self.start = 0  # position in the epoch, counted over all ranks

    def set_epoch(self, epoch: int) -> None:
        """Change the order; Lightning calls this before every epoch, also before a resumed one."""
        if epoch != self.epoch:
            self.epoch = epoch
            self.start = 0

    def __len__(self) -> int:
        return self.count(0)

    def count(self, start: int) -> int:
        """Samples of this rank from position ``start`` of the epoch on."""
        remaining = self.length - start
        return max(0, -(-remaining // self.world))  # rounded up

    def __iter__(self) -> Iterator[Draw]:
        epoch = self.epoch
        start = self.start
        self.start = 0
        order = self._order(epoch)
        if self.repeats > 1 or self.probabilities is not None:
            copies = occurrence(order)
        else:
            copies = np.zeros_like(order)
        # every world-th position from start on, shifted by the rank
        stop = start + self.count(start) * self.world
        positions = np.arange(start, stop, self.world)
        positions = (positions + self.rank) % self.length
        indices = order[positions].tolist()
        pairs = zip(indices, copies[positions].tolist(), strict=True)
        return (Draw(epoch, index, copy) for index, copy in pairs)

    def _order(self, epoch: int) -> np.ndarray:
        generator = np.random.default_rng([self.seed, epoch])
        if self.probabilities is not None:
            order = generator.choice(self.length, self.length, p=self.probabilities)
        else:
            order = generator.permutation(self.length)
        return np.repeat(order, self.repeats)[: self.length]


def occurrence(order: np.ndarray) -> np.ndarray:
    """For each entry, how many equal ones precede it."""
    # equal values side by side, in their order of appearance
    by_value = np.argsort(order, kind="stable")
    values = order[by_value]
    first = np.searchsorted(values, values)
    result = np.empty_like(order)
    result[by_value] = np.arange(len(order)) - first
    return result


def rank_and_world() -> tuple[int, int]:
    """Rank of this process and number of processes."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1
