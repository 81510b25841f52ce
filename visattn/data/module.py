"""ImageData: everything from a folder of pictures to batches, for Lightning or a loop of one's own."""

import logging
from copy import copy

import numpy as np
import torch
import torch.distributed
from lightning.pytorch import LightningDataModule
from lightning.pytorch.overrides.distributed import UnrepeatedDistributedSampler
from torch.utils.data import DataLoader

from visattn.data.augment import TrainTransform
from visattn.data.images import list_images
from visattn.data.kept import KeptImages
from visattn.data.labels import check_same_classes, class_counts, class_weights
from visattn.data.libraries import TORCHVISION, torchvision_images
from visattn.data.loader import (
    EpochSampler,
    EvalLoader,
    ImageSet,
    TrainLoader,
    collate,
    start_worker,
)
from visattn.data.remote import is_remote
from visattn.data.sources import HUB, check_dataset, find_splits, home, parts_of
from visattn.data.transform import EvalTransform, build_transform, measure

_STATISTICS = (
    512  # images for mean and std: the mean then errs by 1/23 of the spread from image to image
)
_HALF = (0.5, 0.5, 0.5)
_log = logging.getLogger(__name__)


class ImageData(LightningDataModule):
    """Labeled images for training, validation, test and prediction.

    Args:
        root: a folder or zip of class folders, or with ``train/``, ``val/`` (or ``valid/``,
            ``validation/``) and ``test/`` of class folders; a folder of tar shards, or their URL,
            such as ``https://HOST/train-{00..07}.tar``, which are fetched into ``data/`` once; with
            ``dataset``, where that lies.
        dataset: None, one of ``cifar10 cifar100 fashion_mnist mnist svhn food101 oxford_pets``,
            ``synthetic``, or ``hf:NAME``, a data set of Hugging Face's hub or a folder that its
            ``save_to_disk`` wrote.
        labels: a CSV file, here or in root, that labels the images of root in place of folders:
            column ``file`` and either ``label``, one class, or ``labels``, any number of classes
            with semicolons between; and if wanted ``split``.
        image_size: side or (height, width) of the images given out.
        batch_size: of each process.
        num_workers: processes that decode and augment; 0 does it in the training process.
        augment: ``none``, ``crop``, ``light``, ``strong`` or ``trivial``, see TrainTransform.
        erase: share of the training images with an erased rectangle; None takes 0.25 for ``strong``
            and 0 elsewhere.
        flip: mirror half of the training images; leave it off for characters, digits, and anything
            with left and right.
        resize: ``cover`` keeps proportions and cuts off what overhangs, ``stretch`` keeps
            everything and distorts.
        mean: per channel in [0, 1]; None computes it, as ``std``, from up to 512 training images.
        std: per channel in [0, 1].
        val_fraction: share of each class held out for validation where there is no ``val/``.
        seed: of the split, the order and the augmentations.
        balanced: draw classes equally often, with replacement.
        repeats: augmented copies of an image in a row.
        on_error: ``skip`` leaves unreadable files out and lists them in ``skipped``; ``raise``
            stops at the first.
        predict_root: a folder, zip or picture to predict, without classes.
        download: allow to fetch ``dataset``, or the shards of ``root``, from the network.
        start_method: ``fork``, ``spawn`` or ``forkserver`` for the workers; None takes the system's
            own.
        persistent_workers: keep the workers from epoch to epoch.
        cache: decode the training and validation images once, to fit, and keep them in memory, up
            to 8 GiB each.

    Shape:
        - Training, validation and test batches: (images (B, 3, h, w) float32, normalized; labels
          (B,) int64, or (B, C) float32 of 0 and 1 where an image may have several classes).
        - Prediction batches: (images (B, 3, h, w) float32, B file names).

    Raises:
        ValueError: an argument is out of range, the root holds fewer than two classes, or its
            splits differ in classes.
        FileNotFoundError: the root or the data set is not there.

    Example:
        >>> data = ImageData(dataset="synthetic", image_size=(24, 32), batch_size=5, num_workers=0)
        >>> data.setup("fit")
        >>> images, labels = next(iter(data.val_dataloader()))
        >>> images.shape, labels
        (torch.Size([5, 3, 24, 32]), tensor([0, 1, 2, 3, 4]))
    """

    # More arguments than a class should have: they are the keys of configs and command line, which
    # stay flat.
    def __init__(
        self,
        root: str | None = None,
        dataset: str | None = None,
        *,
        labels: str | None = None,
        image_size: int | tuple[int, int] = 64,
        batch_size: int = 64,
        num_workers: int = 2,
        augment: str = "light",
        erase: float | None = None,
        flip: bool = False,
        resize: str = "cover",
        mean: tuple[float, float, float] | None = None,
        std: tuple[float, float, float] | None = None,
        val_fraction: float = 0.15,
        seed: int = 0,
        balanced: bool = False,
        repeats: int = 1,
        on_error: str = "skip",
        predict_root: str | None = None,
        download: bool = False,
        start_method: str | None = None,
        persistent_workers: bool = True,
        cache: bool = False,
    ):
        super().__init__()
        self.root, self.dataset, self.labels = root, dataset, labels
        self.predict_root, self.download = predict_root, download
        self.image_size = (
            (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
        )
        self.batch_size, self.num_workers, self.start_method = batch_size, num_workers, start_method
        self.persistent_workers = persistent_workers and num_workers > 0
        self.augment, self.erase, self.flip, self.resize = augment, erase, flip, resize
        self.balanced, self.repeats, self.cache = balanced, repeats, cache
        self.mean, self.std, self.val_fraction, self.seed, self.on_error = (
            mean,
            std,
            val_fraction,
            seed,
            on_error,
        )
        self._parts, self._sets, self._classes = {}, {}, None
        self._check()
        self._statistics = None if mean is None else (list(mean), list(std))

    def _check(self) -> None:
        if self.root is None and self.dataset is None and self.predict_root is None:
            raise ValueError(
                "give root (a folder or zip of class folders), dataset or predict_root"
            )
        check_dataset(self.dataset)
        if self.labels is not None and (self.root is None or self.dataset is not None):
            raise ValueError("labels describe the images of root: give root, and no dataset")
        if self.on_error not in ("skip", "raise"):
            raise ValueError(f"on_error must be skip or raise, got {self.on_error!r}")
        if (
            len(self.image_size) != 2
            or min(self.image_size) < 1
            or self.batch_size < 1
            or self.num_workers < 0
        ):
            raise ValueError(
                "image_size and batch_size must be 1 or more, num_workers 0 or more; got "
                f"image_size={self.image_size}, batch_size={self.batch_size}, num_workers={self.num_workers}"
            )
        if (self.mean is None) != (self.std is None):
            raise ValueError(
                f"give both mean and std or neither, got mean={self.mean}, std={self.std}"
            )
        # these check the rest themselves: built here, so that a wrong word is found before the
        # first file is read
        evaluation = EvalTransform(
            self.image_size, resize=self.resize, mean=self.mean or _HALF, std=self.std or _HALF
        )
        TrainTransform(evaluation, self.augment, erase=self.erase)

    def prepare_data(self) -> None:
        """Fetch a data set once per machine, if allowed."""
        if self.download and self.dataset in TORCHVISION:
            torchvision_images(self.dataset, home(self.root, self.dataset), download=True)
        elif self.download and (is_remote(self.root) or (self.dataset or "").startswith(HUB)):
            self._list_labeled()

    def setup(self, stage: str | None = None) -> None:
        """List the files that the stage needs; reads no image, except to fit with ``cache``."""
        if stage != "predict":
            self._list_labeled()
        if self.cache and stage == "fit" and "train" in self._parts:
            self._keep_pixels()
        if self.predict_root is not None and "predict" not in self._parts:
            source = list_images(self.predict_root)
            self._parts["predict"] = (source, np.arange(len(source)))

    def _list_labeled(self) -> None:
        if "train" in self._parts or (self.root is None and self.dataset is None):
            return
        found = find_splits(
            self.root,
            self.dataset,
            labels=self.labels,
            download=self.download,
            image_size=self.image_size,
            seed=self.seed,
        )
        self._parts |= parts_of(found, self.val_fraction, self.seed)
        self._classes = found["train"].classes

    def _keep_pixels(self) -> None:
        evaluation = EvalTransform(self.image_size)
        for split, transform in {
            "train": TrainTransform(evaluation, self.augment),
            "val": evaluation,
        }.items():
            source, indices = self._part(split)
            if not isinstance(source, KeptImages):
                self._parts[split] = KeptImages(source, indices, transform.long_side), indices

    @property
    def classes(self) -> list[str]:
        """Class names in the order of the labels."""
        if self._classes is None:
            raise RuntimeError("classes are known after setup() of data with a root or dataset")
        return list(self._classes)

    @property
    def num_classes(self) -> int:
        """How many classes there are."""
        return len(self.classes)

    @property
    def channels(self) -> int:
        """Always 3: grey images are expanded."""
        return 3

    @property
    def class_counts(self) -> list[int]:
        """Training images of each class."""
        source, indices = self._part("train")
        return class_counts(source.labels[indices], self.num_classes)

    @property
    def class_weights(self) -> list[float]:
        """Weights in inverse proportion to the counts, whose mean over the training images is 1."""
        return class_weights(self.class_counts)

    @property
    def multilabel(self) -> bool:
        """Whether an image may have several classes."""
        return self._part("train")[0].labels.ndim > 1

    @property
    def skipped(self) -> list[str]:
        """Files that are no images, and images that could not be read so far."""
        sources = {id(source): source for source, _ in self._parts.values()}
        ignored = [name for source in sources.values() for name in source.ignored]
        return sorted(
            {*ignored, *(name for images in self._sets.values() for name in images.skipped())}
        )

    def transform_config(self) -> dict:
        """What build_transform needs to repeat the transform of validation: plain lists, numbers and strings."""
        if self._statistics is None:
            self._list_labeled()
            source, indices = self._part("train")
            chosen = np.random.default_rng(self.seed).permutation(indices)[:_STATISTICS]
            transform = EvalTransform(self.image_size, resize=self.resize)
            self._statistics = measure(
                source, chosen.tolist(), transform, skip=self.on_error == "skip"
            )
        mean, std = self._statistics
        return {
            "image_size": list(self.image_size),
            "resize": self.resize,
            "mean": mean,
            "std": std,
        }

    def state_dict(self) -> dict:
        """What a checkpoint must keep, so that a photograph is seen later as the training images were."""
        return (
            {"classes": self.classes, "transform": self.transform_config()}
            if self._classes is not None
            else {}
        )

    def load_state_dict(self, state: dict) -> None:
        """Take over mean and std of a checkpoint; classes other than its own are refused."""
        if not state:
            return
        if self._classes is not None:
            check_same_classes(state["classes"], self._classes)
        self._classes = state["classes"]
        if self.mean is None:
            self._statistics = (state["transform"]["mean"], state["transform"]["std"])

    def train_dataloader(self) -> DataLoader:
        source, indices = self._part("train")
        if self.balanced and self.multilabel:
            raise ValueError(
                "balanced draws classes equally often: it needs one label per image, not several"
            )
        weights = np.array(self.class_weights)[source.labels[indices]] if self.balanced else None
        rank, world = _place()
        sampler = EpochSampler(
            len(indices),
            seed=self.seed,
            rank=rank,
            world=world,
            weights=weights,
            repeats=self.repeats,
        )
        transform = TrainTransform(
            build_transform(self.transform_config()),
            self.augment,
            flip=self.flip,
            erase=self.erase,
            seed=self.seed,
        )
        # a last batch of one image would break batch normalization
        return self._loader(
            TrainLoader, "train", transform, sampler, drop_last=len(sampler) >= self.batch_size
        )

    def val_dataloader(self) -> DataLoader:
        return self._eval_loader("val")

    def test_dataloader(self) -> DataLoader:
        return self._eval_loader("test")

    def predict_dataloader(self) -> DataLoader:
        return self._eval_loader("predict")

    def ordered_dataloader(self, split: str) -> DataLoader:
        """Images of any split in their order, each once, as validation sees them: without augmentation."""
        return self._eval_loader(split)

    def _eval_loader(self, split: str) -> DataLoader:
        _, indices = self._part(split)
        rank, world = _place()
        if len(indices) < world:
            raise ValueError(
                f"{split}: {len(indices)} images cannot be shared by {world} processes"
            )
        sampler = UnrepeatedDistributedSampler(
            range(len(indices)), num_replicas=world, rank=rank, shuffle=False
        )
        return self._loader(EvalLoader, split, build_transform(self.transform_config()), sampler)

    def _loader(
        self, kind: type[DataLoader], split: str, transform, sampler, drop_last: bool = False
    ) -> DataLoader:
        source, indices = self._part(split)
        if split not in self._sets:  # made once, since it remembers which files are unreadable
            self._sets[split] = ImageSet(
                source, indices, on_error=self.on_error, named=split == "predict"
            )
        images = copy(self._sets[split])  # two loaders of a split may differ in their transform
        images.transform = transform
        return kind(
            dataset=images,
            batch_size=self.batch_size,
            sampler=sampler,
            drop_last=drop_last,
            num_workers=self.num_workers,
            collate_fn=collate,
            pin_memory=torch.cuda.is_available(),
            worker_init_fn=start_worker,
            multiprocessing_context=self.start_method if self.num_workers else None,
            persistent_workers=self.persistent_workers,
            # its own, or every epoch would move torch's global random state
            generator=torch.Generator().manual_seed(self.seed),
        )

    def _part(self, split: str):
        if split not in self._parts:
            wanted = (
                "predict_root" if split == "predict" else f"a root or dataset with a {split} part"
            )
            raise ValueError(
                f"no images for {split}: give {wanted}, then setup() (there is {', '.join(self._parts) or 'nothing'})"
            )
        return self._parts[split]

    def teardown(self, stage: str | None = None) -> None:
        """Name what was skipped."""
        if names := self.skipped:
            more = f" and {len(names) - 10} more" if len(names) > 10 else ""
            _log.warning(
                "skipped %d unreadable files: %s%s", len(names), ", ".join(names[:10]), more
            )


def _place() -> tuple[int, int]:
    """Rank of this process and number of processes."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1
