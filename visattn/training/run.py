"""fit, validate, test, predict and tune: from a configuration to a Run, top to bottom.

>>> command, config = parse(["fit", "--config", "configs/quickstart.yaml"])  # doctest: +SKIP
>>> print(fit(config))  # doctest: +SKIP
"""

from dataclasses import dataclass, field, replace
from pathlib import Path

import lightning.pytorch as pl
from jsonargparse import Namespace
from lightning.pytorch import seed_everything
from lightning.pytorch.utilities import rank_zero_only
from torch import nn

from visattn.data.labels import check_same_classes
from visattn.data.module import ImageData
from visattn.training.checkpoint_io import BEST
from visattn.training.classifier import load_classifier
from visattn.training.errors import expected_warnings_silenced
from visattn.training.invocation import command_words
from visattn.training.module import ImageClassifier
from visattn.training.neighbors import neighbors_accuracy
from visattn.training.parser import image_classifier
from visattn.training.reports.mistakes import collect, write_mistakes
from visattn.training.reports.plots import draw_rates
from visattn.training.reports.predictions import PredictionWriter
from visattn.training.reports.run_report import RunReport
from visattn.training.resume import (
    StartingPoint,
    belongs_to_run,
    list_changes,
    read_starting_point,
)
from visattn.training.run_folder import claim, folder_of, save_config
from visattn.training.trainer import build_trainer, fit_callbacks, fit_loggers, progress_bar
from visattn.training.tune import run_range_test, search_batch_size

print_once = rank_zero_only(print)  # with several processes only the first speaks


@dataclass(frozen=True)
class Run:
    """The result of one command.

    Args:
        folder: The run's folder.
        metrics: Measured numbers by name: of the best epoch (fit), or of the whole set.
        best_epoch: Number of the best epoch, from 0 (fit).
        checkpoint: The best checkpoint (fit), or the one that was used, if any.
    """

    folder: Path
    metrics: dict[str, float] = field(default_factory=dict)
    best_epoch: int | None = None
    checkpoint: Path | None = None

    def __str__(self) -> str:
        lines = [f"Run in {self.folder}"]
        if self.checkpoint is not None:
            lines.append(f"  checkpoint  {self.checkpoint}")
        if self.best_epoch is not None:
            lines.append(f"  best epoch  {self.best_epoch + 1}")
        for name, value in self.metrics.items():
            lines.append(f"  {name:11} {value:.4f}")
        return "\n".join(lines)


@expected_warnings_silenced()
def fit(config: Namespace) -> Run:
    """Train, validate after each epoch, and leave checkpoints and reports in the run's folder."""
    _seed(config)
    folder = folder_of(config)
    start = _read_start(folder, config, "fit")
    resumed = start is not None and belongs_to_run(folder, start.path)
    if resumed:
        for change in list_changes(folder, config.as_dict()):
            print_once(f"changed since the run was stopped: {change}")

    data = build_data(config)
    module = build_module(config, data, start)
    report = RunReport(folder, resumed)
    resumed_step = None
    if start is not None and resumed:
        resumed_step = start.step
    trainer = build_trainer(
        "fit",
        config,
        folder,
        module,
        callbacks=fit_callbacks(config, module, report),
        loggers=fit_loggers(folder, resumed_step),
    )
    _claim_folder(folder, resumed, config)

    trainer.fit(module, datamodule=data, ckpt_path=_checkpoint_of(start), weights_only=True)

    run = _fit_result(folder, report)
    if trainer.is_global_zero:
        if start is not None and trainer.global_step == start.step:
            _print_complete(trainer.current_epoch)
        _print_best(run, module.monitor)
        if run.checkpoint is not None:
            best_network = load_classifier(folder).model
            _write_mistakes(config, best_network, trainer, module, data, folder)
        _print_folder(folder)
    return run


@expected_warnings_silenced()
def validate(config: Namespace) -> Run:
    """Measure a checkpoint on the validation images, and show its most confident mistakes."""
    _seed(config)
    folder = folder_of(config)
    start = _read_start(folder, config, "validate")
    data = build_data(config)
    module = build_module(config, data, start)
    trainer = build_trainer("validate", config, folder, module, progress_bar(config), [])

    trainer.validate(
        module, datamodule=data, ckpt_path=_checkpoint_of(start), verbose=False, weights_only=True
    )

    metrics = _metrics_of(trainer, "val")
    if trainer.is_global_zero:
        _print_metrics(module, metrics)
        if config.knn:
            _print_neighbors_accuracy(config.knn, module, data, trainer)
        if not module.sharded:  # with sharded parameters one process has no whole network
            _write_mistakes(config, module.model, trainer, module, data, folder)
    return Run(folder, metrics, checkpoint=_checkpoint_of(start))


@expected_warnings_silenced()
def test(config: Namespace) -> Run:
    """Measure a checkpoint on the test images."""
    _seed(config)
    folder = folder_of(config)
    start = _read_start(folder, config, "test")
    data = build_data(config)
    module = build_module(config, data, start)
    trainer = build_trainer("test", config, folder, module, progress_bar(config), [])

    trainer.test(
        module, datamodule=data, ckpt_path=_checkpoint_of(start), verbose=False, weights_only=True
    )

    metrics = _metrics_of(trainer, "test")
    if trainer.is_global_zero:
        _print_metrics(module, metrics)
    return Run(folder, metrics, checkpoint=_checkpoint_of(start))


@expected_warnings_silenced()
def predict(config: Namespace) -> Run:
    """Write the most likely class of each image to predictions.csv."""
    _seed(config)
    folder = folder_of(config)
    start = _read_start(folder, config, "predict")
    data = ImageData(**config.data.as_dict())
    # images without labels: the classes are those of the checkpoint
    classes = start.classes if start else []
    module = image_classifier(num_classes=len(classes), **config.model.as_dict())
    writer = PredictionWriter(folder)
    callbacks = [*progress_bar(config), writer]
    trainer = build_trainer("predict", config, folder, module, callbacks, [])

    trainer.predict(
        module,
        datamodule=data,
        return_predictions=config.return_predictions,
        ckpt_path=_checkpoint_of(start),
        weights_only=True,
    )

    if trainer.is_global_zero:
        line = f"predictions of {writer.count} images lie in {writer.path}"
        if trainer.world_size > 1:
            line += f", those of the other processes in predictions.*.csv of {folder}"
        print(line)
    return Run(folder, checkpoint=_checkpoint_of(start))


@expected_warnings_silenced()
def tune(config: Namespace) -> Run:
    """Search the largest batch that fits into a GPU, and a learning rate; draw rates.png."""
    _seed(config)
    folder = folder_of(config)
    data = build_data(config)
    module = build_module(config, data, None)
    trainer = build_trainer("tune", config, folder, module, progress_bar(config), [])

    batch_size = search_batch_size(trainer, module, data)
    search = run_range_test(trainer, module, data)

    metrics: dict[str, float] = {}
    if batch_size is not None:
        metrics["batch_size"] = batch_size
    if search.best_rate is not None:
        metrics["lr"] = search.best_rate
    if trainer.is_global_zero:
        folder.mkdir(parents=True, exist_ok=True)
        picture = folder / "rates.png"
        draw_rates(search.rates, search.losses, search.best_rate, picture)
        if batch_size is not None:
            print(f"largest batch that fits  --data.batch_size {batch_size}")
        suggestion = "too few steps to tell"
        if search.best_rate is not None:
            suggestion = f"--model.lr {search.best_rate:.2g}"
        print(f"learning rate            {suggestion} (drawn in {picture})")
    return Run(folder, metrics)


def build_data(config: Namespace) -> ImageData:
    """Return the data of a configuration, with the images listed and split."""
    data = ImageData(**config.data.as_dict())
    data.prepare_data()
    data.setup()
    return data


def build_module(
    config: Namespace, data: ImageData, start: StartingPoint | None = None
) -> ImageClassifier:
    """Build the classifier of a configuration for the classes in the data.

    Raises:
        ValueError: The checkpoint that the command starts from has other classes.
    """
    if start is not None and start.classes:
        check_same_classes(start.classes, data.classes)
    return image_classifier(
        num_classes=data.num_classes,
        multilabel=data.multilabel,
        **config.model.as_dict(),
    )


def _seed(config: Namespace) -> None:
    """Seed all random generators, unless ``seed_everything`` is false; true draws a seed."""
    if config.seed_everything is False:
        return
    seed = None if config.seed_everything is True else config.seed_everything
    config.seed_everything = seed_everything(seed, workers=True)


def _read_start(
    folder: Path,
    config: Namespace,
    command: str,
) -> StartingPoint | None:
    start = read_starting_point(folder, config.ckpt_path, command)
    if start is not None and start.notice:
        print_once(start.notice)
    return start


def _checkpoint_of(start: StartingPoint | None) -> Path | None:
    if start is None:
        return None
    return start.path


@rank_zero_only
def _claim_folder(
    folder: Path,
    resumed: bool,
    config: Namespace,
) -> None:
    notice = claim(folder, resumed)
    if notice:
        print(notice)
    if not config.trainer.fast_dev_run:
        save_config(folder, config)


def _fit_result(folder: Path, report: RunReport) -> Run:
    run = Run(folder, report.best_metrics, report.best.get("epoch"))
    best_checkpoint = folder / "checkpoints" / BEST
    if best_checkpoint.is_file():
        run = replace(run, checkpoint=best_checkpoint)
    return run


def _metrics_of(trainer: pl.Trainer, split: str) -> dict[str, float]:
    """Return what was logged of a split, such as {"loss": 0.3, "accuracy": 0.9}."""
    metrics = {}
    for key, value in trainer.callback_metrics.items():
        metrics[key.removeprefix(f"{split}_")] = float(value)
    return metrics


def _print_metrics(module: ImageClassifier, metrics: dict[str, float]) -> None:
    remaining = dict(metrics)
    if module.matrix is not None:
        right = int(module.matrix.trace())
        total = int(module.matrix.sum())
        print(f"accuracy {100 * right / total:.2f} % ({right} of {total} images)")
        del remaining["accuracy"]
    print(", ".join(f"{name} {value:.4f}" for name, value in remaining.items()))


def _print_neighbors_accuracy(
    k: int,
    module: ImageClassifier,
    data: ImageData,
    trainer: pl.Trainer,
) -> None:
    if trainer.world_size > 1:
        print("knn is left out: it compares all images in one process")
        return
    accuracy = neighbors_accuracy(module.model, data, k, trainer.strategy.root_device)
    print(f"accuracy of {k} nearest neighbors {100 * accuracy:.2f} %")


def _print_complete(epochs: int) -> None:
    longer = f"--trainer.max_epochs {2 * epochs}"
    print(f"the run was complete after {epochs} epochs; to train longer: {longer}")


def _print_best(run: Run, monitor: str) -> None:
    if run.best_epoch is None:
        return
    name = monitor.removeprefix("val_")
    percent = 100 * run.metrics[monitor]
    print(f"\nvalidation {name:9}  {percent:.2f} % (best, epoch {run.best_epoch + 1})")


def _print_folder(folder: Path) -> None:
    print(f"the run is in        {folder}")
    sample = folder / "attention" / "sample.png"
    if sample.is_file():
        words = f"{command_words('visattn')} map {sample} --model {folder} --out out/"
        print(f"see what it looks at {words}")


def _write_mistakes(
    config: Namespace,
    network: nn.Module,
    trainer: pl.Trainer,
    module: ImageClassifier,
    data: ImageData,
    folder: Path,
) -> None:
    """Write mistakes.html, where images have one label each and the run has a folder."""
    if not config.mistakes or module.multilabel or not folder.is_dir():
        return
    device = trainer.strategy.root_device
    network = network.to(device).eval()
    mistakes = collect(network, data.val_dataloader(), device, config.mistakes, module.recipe)
    write_mistakes(mistakes, network, data, folder / "mistakes.html", device)
