"""`visattn bench train`: what Lightning and its callbacks add to a plain loop, and the own ViT against timm's."""

import logging
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import lightning.pytorch as pl
import timm
import torch
import torch.nn.functional as F
from rich import print
from torch import nn

from visattn.bench.timing import measure, table
from visattn.data.module import ImageData
from visattn.models.presets import create_model
from visattn.training.module import ImageClassifier
from visattn.training.parser import TRAINER_DEFAULTS
from visattn.training.recipe import Recipe
from visattn.training.reports.run_report import RunReport
from visattn.training.trainer import fit_callbacks, fit_loggers

_PAIRS = {
    "vit_tiny_patch16": "vit_tiny_patch16_224",
    "vit_small_patch16": "vit_small_patch16_224",
    "vit_base_patch16": "vit_base_patch16_224",
}


def run(
    *,
    root: str = "assets/writing_systems.zip",
    model: str = "vit_nano",
    image_size: int = 48,
    batch_size: int = 64,
    steps: int = 30,
    repeats: int = 3,
    threads: int = 2,
    against: str = "vit_tiny_patch16",
) -> None:
    """Print what a step of fit and of a plain loop costs on one model and data, then the own ViT against timm's.

    Args:
        root: Folder or zip of class folders to train on.
        model: The network that is trained.
        image_size: Side of its images.
        batch_size: Of the training; 8 for the comparison with timm.
        steps: Training steps of each measurement.
        repeats: Measurements of each, taken in turns; medians are shown with their spread.
        threads: Threads of torch.
        against: Which own ViT is compared with timm's: vit_tiny_patch16, vit_small_patch16 or
            vit_base_patch16.
    """
    if against not in _PAIRS:
        raise ValueError(f"against must be one of {', '.join(_PAIRS)}; got {against!r}")
    torch.set_num_threads(threads)
    options = {
        "root": root,
        "model": model,
        "image_size": image_size,
        "batch_size": batch_size,
        "steps": steps,
    }
    print(_loops(options, repeats))
    print(_vits(against, repeats))


def _loops(options: dict, repeats: int) -> str:
    """Time whole trainings, in turns, by this process's CPU time: loading happens in it, for both alike."""
    seconds: dict[str, list[float]] = {"plain loop": [], "fit": []}
    for _ in range(repeats):
        seconds["plain loop"].append(_plain(**options))
        seconds["fit"].append(_fit(**options))
    steps = options["steps"]
    times = {
        name: sorted(1000 * value / steps for value in values) for name, values in seconds.items()
    }
    plain = times["plain loop"][repeats // 2]
    rows = [
        (
            name,
            f"{part[repeats // 2]:.1f} ({part[0]:.1f}-{part[-1]:.1f})",
            f"{part[repeats // 2] - plain:+.1f}",
        )
        for name, part in times.items()
    ]
    title = (
        f"{options['model']}, {options['batch_size']} x {options['image_size']} px, {steps} steps"
    )
    return table((title, "CPU ms a step", "over plain"), rows)


def _data(root: str, image_size: int, batch_size: int) -> ImageData:
    data = ImageData(
        root,
        image_size=image_size,
        batch_size=batch_size,
        num_workers=0,
        mean=(0.5,) * 3,
        std=(0.5,) * 3,
    )
    data.setup("fit")
    return data


def _endless(data: ImageData) -> Iterator:
    loader = data.train_dataloader()
    while True:
        yield from loader


def _plain(root: str, model: str, image_size: int, batch_size: int, steps: int) -> float:
    """Return the seconds of a loop of one's own: the same network, loss, optimizer, clipping and data."""
    data = _data(root, image_size, batch_size)
    network = create_model(model, num_classes=data.num_classes, image_size=image_size).train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3, weight_decay=0.05)
    batches = _endless(data)
    _step(network, optimizer, next(batches))
    start = time.process_time()
    for _ in range(steps):
        _step(network, optimizer, next(batches))
    return time.process_time() - start


def _step(network: nn.Module, optimizer: torch.optim.Optimizer, batch: tuple) -> None:
    images, labels = batch
    loss = F.cross_entropy(network(images), labels, label_smoothing=0.1)
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(network.parameters(), 1.0)
    optimizer.step()


class _Clock(pl.Callback):
    """Take the time from the end of the first step to the end of the last."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx: int) -> None:
        if trainer.global_step == 1:
            self.start = time.process_time()
        self.seconds = time.process_time() - self.start


def _fit(root: str, model: str, image_size: int, batch_size: int, steps: int) -> float:
    """Return the seconds of the same steps by Lightning, with all that `train.py fit` does beside."""
    data = _data(root, image_size, batch_size)
    network = {"name": model, "num_classes": data.num_classes, "image_size": image_size}
    asked = {
        "ckpt_path": None,
        "overlays": 0,
        "patience": 0,
        "checkpoint_steps": 0,
        "checkpoint_minutes": 0,
    }
    config = SimpleNamespace(
        **asked, trainer=SimpleNamespace(enable_progress_bar=True, logger=None, strategy="auto")
    )
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    clock = _Clock()
    module = ImageClassifier(network, recipe=Recipe())
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter(
            "ignore"
        )  # Lightning's advice on loaders and folders is not for a measurement
        trainer = pl.Trainer(
            **TRAINER_DEFAULTS
            | {
                "max_epochs": -1,
                "max_steps": steps + 1,
                "gradient_clip_val": 1.0,
                "limit_val_batches": 0,
            },
            accelerator="cpu",
            logger=fit_loggers(Path(folder)),
            callbacks=[*fit_callbacks(config, module, RunReport(Path(folder))), clock],
        )
        trainer.fit(module, datamodule=data)
    return clock.seconds


def _vits(name: str, repeats: int) -> str:
    """Compare the own ViT with timm's: the same architecture, 8 images of 224 pixels, process CPU time."""
    models = {"own": create_model(name), "timm": timm.create_model(_PAIRS[name])}
    images = torch.randn(8, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    rows = []
    for part, work in (("forward", _forward), ("forward+backward", _both)):
        times = measure(
            {key: _bound(work, model, images) for key, model in models.items()},
            repeats=max(repeats, 3),
        )
        rows.append(
            (
                part,
                times["own"],
                times["timm"],
                f"{times['timm'].median / times['own'].median:.2f}x",
            )
        )
    return table((f"{name}, 8 x 224 px", "own, ms", "timm, ms", "timm / own"), rows)


def _bound(work: Callable, model: nn.Module, images: torch.Tensor) -> Callable[[], None]:
    return lambda: work(model, images)


def _forward(model: nn.Module, images: torch.Tensor) -> None:
    with torch.no_grad():
        model(images)


def _both(model: nn.Module, images: torch.Tensor) -> None:
    model.zero_grad()
    model(images).sum().backward()
