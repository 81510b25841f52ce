"""ImageData: from a source of images to batches, for Lightning or any training loop."""

import logging
from copy import copy
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.overrides.distributed import UnrepeatedDistributedSampler
from torch.utils.data import DataLoader, Sampler

from visattn.data.augment import TrainTransform
from visattn.data.cached_images import CachedImages
from visattn.data.images import list_images
from visattn.data.labels import check_same_classes, class_counts, class_weights
from visattn.data.loader import EvalLoader, ImageSet, TrainLoader, collate, start_worker
from visattn.data.sampler import EpochSampler, rank_and_world
from visattn.data.source import SourceOptions
from visattn.data.sources import Split, divide_splits, find_source_type
from visattn.data.transform import EvalTransform, build_transform, measure

# images for mean and std: the mean then errs by 1/23 of the spread from image to image
_NUM_MEASURED = 512
_HALF = (0.5, 0.5, 0.5)
_MAX_LISTED = 10  # unreadable files that a warning names
_log = logging.getLogger(__name__)

ImageTransform = EvalTransform | TrainTransform


class ImageData(LightningDataModule):
    """Labeled images for training, validation, test and prediction.

    Args:
        root: a folder or zip of class folders, or with ``train/``, ``val/`` (or ``valid/``,
            ``validation/``) and ``test/`` of class folders; a folder of tar shards, or their URL,
            such as ``https://HOST/train-{00..07}.tar``, which are fetched into ``data/`` once; with
            ``dataset``, the folder of its files.
        dataset: None, one of ``cifar10 cifar100 fashion_mnist mnist svhn food101 oxford_pets``,
            ``synthetic``, or ``hf:NAME``, a data set of Hugging Face's hub or a folder that its
            ``save_to_disk`` wrote.
        labels: a CSV file, a path or a name in root, that labels the images of root in place of
            folders: column ``file`` and either ``label``, one class, or ``labels``, any number of
            classes separated by semicolons; optionally ``split``.
        image_size: side or (height, width) of the images in a batch.
        batch_size: images per batch and process.
        num_workers: processes that decode and augment; 0 does it in the training process.
        augment: ``none``, ``crop``, ``light``, ``strong`` or ``trivial``, see TrainTransform.
        erase: share of the training images with an erased rectangle; None means 0.25 for ``strong``
            and 0 otherwise.
        flip: mirror half of the training images; leave it off for characters, digits, and anything
            with left and right.
        resize: ``cover`` keeps proportions and cuts off what exceeds the image, ``stretch`` keeps
            everything and distorts.
        mean: per channel in [0, 1]; None computes it from up to 512 training images.
        std: per channel in [0, 1]; None likewise.
        val_fraction: share of each class held out for validation where there is no ``val/``.
        seed: for the split, the order and the augmentations.
        balanced: draw classes equally often, with replacement.
        repeats: augmented copies of an image that follow each other.
        on_error: ``skip`` leaves unreadable files out and lists them in ``skipped``; ``raise``
            stops at the first.
        predict_root: a folder, zip or picture to predict, without classes.
        download: allow fetching ``dataset``, or the shards of ``root``, from the network.
        start_method: ``fork``, ``spawn`` or ``forkserver`` for the workers; None means the
            system's own.
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
        FileNotFoundError: the root or the data set does not exist.

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
        self.root = root
        self.dataset = dataset
        self.labels = labels
        self.predict_root = predict_root
        self.download = download
        if isinstance(image_size, int):
            image_size = (image_size, image_size)
        # a list in configs
        self.image_size: tuple[int, int] = tuple(image_size)  # type: ignore[assignment]
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.start_method = start_method
        self.persistent_workers = persistent_workers and num_workers > 0
        self.augment = augment
        self.erase = erase
        self.flip = flip
        self.resize = resize
        self.balanced = balanced
        self.repeats = repeats
        self.cache = cache
        self.mean = mean
        self.std = std
        self.val_fraction = val_fraction
        self.seed = seed
        self.on_error = on_error
        self._splits: dict[str, Split] = {}
        self._image_sets: dict[str, ImageSet] = {}
        self._classes: list[str] | None = None
        self._statistics: tuple[list[float], list[float]] | None = None
        if mean is not None and std is not None:
            self._statistics = (list(mean), list(std))
        self._check_source()
        self._check_batches()

    def _check_source(self) -> None:
        """Refuse a source that cannot be, before any file is read."""
        if self.root is None and self.dataset is None and self.predict_root is None:
            raise ValueError(
                "give root (a folder or zip of class folders), dataset or predict_root"
            )
        if self.dataset is not None:
            find_source_type(self._source_options())
        if self.labels is not None and (self.root is None or self.dataset is not None):
            raise ValueError("labels describe the images of root: give root, and no dataset")

    def _check_batches(self) -> None:
        """Refuse wrong numbers and words about images and batches."""
        if self.on_error not in ("skip", "raise"):
            raise ValueError(f"on_error must be skip or raise, got {self.on_error!r}")
        size_is_valid = len(self.image_size) == 2 and min(self.image_size) >= 1
        if not size_is_valid or self.batch_size < 1 or self.num_workers < 0:
            raise ValueError(
                "image_size and batch_size must be 1 or more, num_workers 0 or more; got "
                f"image_size={self.image_size}, batch_size={self.batch_size}, "
                f"num_workers={self.num_workers}"
            )
        if (self.mean is None) != (self.std is None):
            raise ValueError(
                f"give both mean and std or neither, got mean={self.mean}, std={self.std}"
            )
        # the transforms check their arguments
        evaluation = EvalTransform(
            self.image_size,
            resize=self.resize,
            mean=self.mean or _HALF,
            std=self.std or _HALF,
        )
        TrainTransform(evaluation, self.augment, erase=self.erase)

    def _source_options(self) -> SourceOptions:
        return SourceOptions(
            root=self.root,
            dataset=self.dataset,
            labels=self.labels,
            download=self.download,
            image_size=self.image_size,
            seed=self.seed,
        )

    # Setup

    def prepare_data(self) -> None:
        """Fetch a data set once per machine, if allowed."""
        if not self.download or (self.root is None and self.dataset is None):
            return
        options = self._source_options()
        download = find_source_type(options).download
        if download is not None:
            download(options)

    def setup(self, stage: str | None = None) -> None:
        """List the files that the stage needs; reads no image, except to fit with ``cache``."""
        if stage != "predict":
            self._list_source()
        if self.cache and stage == "fit" and "train" in self._splits:
            self._cache_pixels()
        if self.predict_root is not None and "predict" not in self._splits:
            source = list_images(self.predict_root)
            self._splits["predict"] = Split(source, np.arange(len(source)))

    def _list_source(self) -> None:
        if "train" in self._splits or (self.root is None and self.dataset is None):
            return
        options = self._source_options()
        sources = find_source_type(options).list_splits(options)
        self._splits |= divide_splits(sources, self.val_fraction, self.seed)
        self._classes = sources["train"].classes

    def _cache_pixels(self) -> None:
        evaluation = EvalTransform(self.image_size)
        transforms: dict[str, ImageTransform] = {
            "train": TrainTransform(evaluation, self.augment),
            "val": evaluation,
        }
        for name, transform in transforms.items():
            source, indices = self.split(name)
            if not isinstance(source, CachedImages):
                cached = CachedImages(source, indices, transform.long_side)
                self._splits[name] = Split(cached, indices)

    def teardown(self, stage: str | None = None) -> None:
        """Warn of the files that were skipped."""
        names = self.skipped
        if not names:
            return
        listed = ", ".join(names[:_MAX_LISTED])
        if len(names) > _MAX_LISTED:
            listed += f" and {len(names) - _MAX_LISTED} more"
        _log.warning("skipped %d unreadable files: %s", len(names), listed)

    # What the images are

    def split(self, name: str) -> Split:
        """Source and indices of ``train``, ``val``, ``test`` or ``predict``, after setup()."""
        if name in self._splits:
            return self._splits[name]
        needed = "predict_root" if name == "predict" else f"a root or dataset with a {name} part"
        raise ValueError(
            f"no images for {name}: give {needed}, then setup() "
            f"(there is {', '.join(self._splits) or 'nothing'})"
        )

    @property
    def classes(self) -> list[str]:
        """Class names in the order of the labels."""
        if self._classes is None:
            raise RuntimeError("classes are known after setup() of data with a root or dataset")
        return list(self._classes)

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.classes)

    @property
    def channels(self) -> int:
        """Always 3: grey images are expanded."""
        return 3

    @property
    def class_counts(self) -> list[int]:
        """Training images of each class."""
        source, indices = self.split("train")
        return class_counts(source.labels[indices], self.num_classes)

    @property
    def class_weights(self) -> list[float]:
        """Weights in inverse proportion to the counts, whose mean over the training images is 1."""
        return class_weights(self.class_counts)

    @property
    def multilabel(self) -> bool:
        """Whether an image may have several classes."""
        return self.split("train").source.labels.ndim > 1

    @property
    def skipped(self) -> list[str]:
        """Files that are no images, and images that could not be read so far."""
        names: set[str] = set()
        for source, _ in self._splits.values():
            names.update(source.ignored)
        for images in self._image_sets.values():
            names.update(images.skipped())
        return sorted(names)

    # What a checkpoint keeps

    def transform_config(self) -> dict[str, Any]:
        """What build_transform needs to repeat the transform of validation, as plain values."""
        if self._statistics is None:
            self._list_source()
            source, indices = self.split("train")
            generator = np.random.default_rng(self.seed)
            indices = generator.permutation(indices)[:_NUM_MEASURED]
            transform = EvalTransform(self.image_size, resize=self.resize)
            skip = self.on_error == "skip"
            self._statistics = measure(source, indices.tolist(), transform, skip=skip)
        mean, std = self._statistics
        return {
            "image_size": list(self.image_size),
            "resize": self.resize,
            "mean": mean,
            "std": std,
        }

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps, so that later images are transformed as those of training."""
        if self._classes is None:
            return {}
        return {"classes": self.classes, "transform": self.transform_config()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over mean and std of a checkpoint; refuse other classes than its own."""
        if not state:
            return
        if self._classes is not None:
            check_same_classes(state["classes"], self._classes)
        self._classes = state["classes"]
        if self.mean is None:
            self._statistics = (state["transform"]["mean"], state["transform"]["std"])

    # Loaders

    def train_dataloader(self) -> DataLoader:
        """Augmented images in the order of seed and epoch."""
        sampler = self._train_sampler()
        transform = TrainTransform(
            build_transform(self.transform_config()),
            self.augment,
            flip=self.flip,
            erase=self.erase,
            seed=self.seed,
        )
        # a last batch of one image would break batch normalization
        drop_last = len(sampler) >= self.batch_size
        return self._build_loader(TrainLoader, "train", transform, sampler, drop_last)

    def val_dataloader(self) -> DataLoader:
        """Validation images in their order."""
        return self.ordered_dataloader("val")

    def test_dataloader(self) -> DataLoader:
        """Test images in their order."""
        return self.ordered_dataloader("test")

    def predict_dataloader(self) -> DataLoader:
        """Images of ``predict_root`` in their order, with their file names."""
        return self.ordered_dataloader("predict")

    def ordered_dataloader(self, split: str) -> DataLoader:
        """Images of any split in their order, each once, without augmentation."""
        num_images = len(self.split(split).indices)
        rank, world = rank_and_world()
        if num_images < world:
            raise ValueError(f"{split}: {num_images} images cannot be shared by {world} processes")
        sampler = UnrepeatedDistributedSampler(
            range(num_images), num_replicas=world, rank=rank, shuffle=False
        )
        transform = build_transform(self.transform_config())
        return self._build_loader(EvalLoader, split, transform, sampler)

    def _train_sampler(self) -> EpochSampler:
        source, indices = self.split("train")
        weights = None
        if self.balanced:
            if self.multilabel:
                raise ValueError(
                    "balanced draws classes equally often: it needs one label per image, "
                    "not several"
                )
            labels = source.labels[indices]
            weights = np.array(self.class_weights)[labels]  # (C,) -> (N,)
        rank, world = rank_and_world()
        return EpochSampler(
            len(indices),
            seed=self.seed,
            rank=rank,
            world=world,
            weights=weights,
            repeats=self.repeats,
        )

    def _image_set(self, split: str, transform: ImageTransform) -> ImageSet:
        """The images of a split; all its sets share which files are unreadable."""
        source, indices = self.split(split)
        if split not in self._image_sets:
            self._image_sets[split] = ImageSet(
                source, indices, on_error=self.on_error, named=split == "predict"
            )
        # a copy, since two loaders of a split may differ in their transform
        images = copy(self._image_sets[split])
        images.transform = transform
        return images

    def _build_loader(
        self,
        loader_class: type[DataLoader],
        split: str,
        transform: ImageTransform,
        sampler: Sampler,
        drop_last: bool = False,
    ) -> DataLoader:
        return loader_class(
            dataset=self._image_set(split, transform),
            batch_size=self.batch_size,
            sampler=sampler,
            drop_last=drop_last,
            num_workers=self.num_workers,
            collate_fn=collate,
            pin_memory=torch.cuda.is_available(),
            worker_init_fn=start_worker,
            multiprocessing_context=self.start_method if self.num_workers else None,
            persistent_workers=self.persistent_workers,
            # its own generator: else every epoch would change torch's global random state
            generator=torch.Generator().manual_seed(self.seed),
        )
