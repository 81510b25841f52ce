"""The command line of training: flat keys in, one run folder out, one line for whatever is wrong."""

import errno
import logging
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from visattn.data.labels import check_same_classes
from visattn.data.module import ImageData
from visattn.training.callbacks.progress_bar import Bar
from visattn.training.callbacks.stopping import Interrupted, NotFinite, lost_worker
from visattn.training.checkpoint_io import KEY, AtomicCheckpointIO, read_checkpoint
from visattn.training.classifier import load_classifier
from visattn.training.invocation import command
from visattn.training.neighbors import neighbors_accuracy
from visattn.training.parser import Parser, image_classifier
from visattn.training.reports.mistakes import collect, write_mistakes
from visattn.training.reports.plots import draw_rates
from visattn.training.reports.predictions import PredictionWriter
from visattn.training.reports.run_report import RunReport
from visattn.training.resume import changes, chosen, same_run
from visattn.training.run_folder import claim
from visattn.training.sharded_parameters import sharding_strategy
from visattn.training.trainer import SavedConfig, callbacks, given_loggers, loggers
from visattn.training.tune import Trainer

QUIET = (  # warnings of Lightning about what is meant to be so
    "does not have many workers",
    "Experiment logs directory",
    "exists and is not empty",
    "is smaller than the logging",
    "isinstance.treespec, LeafSpec.. is deprecated",
    "Be aware that when using `ckpt_path`, callbacks",
    "The dirpath has changed from",
    "The checkpoint was not created with WeightAveraging",  # then both start from its weights
    "WeightAveraging callback with a model that overrides",  # which it does for sharded parameters alone
    "args parameter is intended to run from within Python",
    "instantiate_classes",  # Lightning's own use of older names of jsonargparse, three lines
    "skip_none parameter",
    "JsonargparseDeprecationWarning",
)

KEYS = (
    ("name", str, "run", "name of the run: it lies in runs/NAME"),
    ("out", str | None, None, "folder of the run, in place of runs/NAME"),
    ("patience", int, 0, "stop after so many epochs without a better one; 0 = never"),
    (
        "checkpoint_steps",
        int,
        0,
        "save last.ckpt every so many steps too; 0 = only after each epoch",
    ),
    (
        "checkpoint_minutes",
        float,
        0.0,
        "save last.ckpt every so many minutes too; 0 = only after each epoch",
    ),
    (
        "overlays",
        int,
        6,
        "number of validation images whose attention is drawn after each epoch; 0 = none",
    ),
    ("mistakes", int, 24, "number of the most confident mistakes shown in mistakes.html; 0 = none"),
    (
        "knn",
        int,
        0,
        "validate: also class each image as so many nearest neighbors among the features are; 0 = do not",
    ),
)


class TrainingCLI(LightningCLI):
    """fit, validate, test and predict an ImageClassifier on ImageData, with everything about a run in one folder."""

    checkpoint_classes: Sequence[str] = ()  # of the checkpoint that is taken up

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Return Lightning's commands and tune."""
        return {**LightningCLI.subcommands(), "tune": {"model", "datamodule"}}

    def init_parser(self, **kwargs) -> Parser:
        parser = super().init_parser(allow_abbrev=False, **kwargs)
        self.family = [*getattr(self, "family", []), parser]
        parser.family = self.family
        for other in self.family:
            other.family = self.family
        return parser

    def add_arguments_to_parser(self, parser: Parser) -> None:
        for key, kind, default, help in KEYS:
            parser.add_argument(f"--{key}", type=kind, default=default, help=help)
        parser.link_arguments("model.image_size", "data.image_size")
        parser.link_arguments("seed_everything", "data.seed", compute_fn=int)
        parser.link_arguments("seed_everything", "model.seed", compute_fn=int)
        parser.link_arguments(
            "data", "model.num_classes", compute_fn=self._count_classes, apply_on="instantiate"
        )
        parser.link_arguments(
            "data", "model.multilabel", compute_fn=self._several, apply_on="instantiate"
        )

    def _count_classes(self, data: ImageData) -> int:
        if self.subcommand == "predict":
            return len(self.checkpoint_classes)
        if self.checkpoint_classes:
            check_same_classes(self.checkpoint_classes, self._listed(data).classes)
        return self._listed(data).num_classes

    def _several(self, data: ImageData) -> bool:
        return self.subcommand != "predict" and self._listed(data).multilabel

    def _listed(self, data: ImageData) -> ImageData:
        data.prepare_data()
        data.setup()
        return data

    def _parse_ckpt_path(self) -> None:
        """Do nothing: keys come from config and command line, never from a checkpoint behind the user's back."""

    def before_instantiate_classes(self) -> None:
        config = self.config[self.subcommand]
        self.folder = Path(config.out or Path("runs", config.name))
        if (
            config.trainer.fast_dev_run
        ):  # a trial of the code must not write over a run, nor move it aside
            self.folder = self.folder.with_name(f"{self.folder.name}.trial")
        if "weights_only" in config:
            config.weights_only = True
        self.resumed_step = None
        if "verbose" in config:
            config.verbose = False  # one line of our own says it
        path, problem = chosen(self.folder, config.get("ckpt_path"), self.subcommand)
        if path is not None:
            content = read_checkpoint(path)
            self.resumed_step, self.checkpoint_classes = (
                content["global_step"],
                content[KEY]["classes"],
            )
        if problem:
            print(f"{problem}; using {path}")
        if "ckpt_path" in config:
            config.ckpt_path = None if path is None else str(path)
        self.resumed = self.subcommand == "fit" and path is not None and same_run(self.folder, path)
        if self.resumed and rank_zero_only.rank == 0:
            for line in changes(self.folder, config.as_dict()):
                print(f"changed since the run was stopped: {line}")

    def instantiate_trainer(self, **kwargs):
        config = self.config_init[self.subcommand]
        fit = self.subcommand == "fit"
        self.save_config_callback = self.save_config_callback if fit else None
        if config.trainer.logger is not False:
            own = loggers(self.folder, self.resumed_step if self.resumed else None) if fit else []
            kwargs["logger"] = [*own, *given_loggers(config.trainer.logger)] or False
        kwargs |= {
            "default_root_dir": str(self.folder),
            "enable_checkpointing": fit,
            "plugins": AtomicCheckpointIO(),
        }
        if config.trainer.strategy == "fsdp":
            kwargs["strategy"] = sharding_strategy(config.model)
        if fit:
            added = callbacks(config, self.folder, config.model, self.resumed)
        else:
            added = [Bar()] if config.trainer.enable_progress_bar is not False else []
            added += [PredictionWriter(self.folder)] if self.subcommand == "predict" else []
        self.trainer_defaults["callbacks"] = added
        trainer = super().instantiate_trainer(**kwargs)
        if config.trainer.sync_batchnorm and trainer.strategy.root_device.type == "cpu":
            raise ValueError(
                "trainer.sync_batchnorm needs GPUs: torch has no such layer for the CPU"
            )
        if (
            fit and rank_zero_only.rank == 0
        ):  # model, data and trainer stand: what is misspelt moves no run aside
            notice = claim(self.folder, self.resumed)
            if notice:
                print(notice)
        return trainer

    @rank_zero_only
    def after_fit(self) -> None:
        best = next(part.best for part in self.trainer.callbacks if isinstance(part, RunReport))
        if self.resumed_step is not None and self.trainer.global_step == self.resumed_step:
            longer = f"--trainer.max_epochs {2 * self.trainer.current_epoch}"
            print(
                f"the run was complete after {self.trainer.current_epoch} epochs; to train longer: {longer}"
            )
        if "epoch" in best:
            value = best[self.model.monitor]
            print(
                f"\nvalidation {self.model.monitor[4:]:9}  {100 * value:.2f} % (best, epoch {best['epoch'] + 1})"
            )
        if (self.folder / "checkpoints" / "best.ckpt").is_file():
            self._write_mistakes(load_classifier(self.folder).model)
        print(f"the run lies in      {self.folder}")
        sample = self.folder / "attention" / "sample.png"
        if sample.is_file():
            print(
                f"see what it saw      {command('visattn')} map {sample} --model {self.folder} --out out/"
            )

    @rank_zero_only
    def after_validate(self) -> None:
        self._say_accuracy("val")
        device, config = self.trainer.strategy.root_device, self.config[self.subcommand]
        if config.knn and self.trainer.world_size > 1:
            print("knn is left out: it compares all images in one process")
        elif config.knn:
            accuracy = neighbors_accuracy(self.model.model, self.datamodule, config.knn, device)
            print(f"accuracy of {config.knn} nearest neighbors {100 * accuracy:.2f} %")
        if not self.model.sharded:  # one process alone has no whole network to look at
            self._write_mistakes(self.model.model)

    def _write_mistakes(self, model) -> None:
        count, device = self.config[self.subcommand].mistakes, self.trainer.strategy.root_device
        if count and not self.model.multilabel and self.folder.is_dir():
            images, recipe = self.datamodule.val_dataloader(), self.model.recipe
            found = collect(model.to(device).eval(), images, device, count, recipe)
            write_mistakes(found, model, self.datamodule, self.folder / "mistakes.html", device)

    @rank_zero_only
    def after_tune(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        picture = self.folder / "rates.png"
        draw_rates(self.trainer.rates, self.trainer.losses, self.trainer.rate, picture)
        if self.trainer.batch_size is not None:
            print(f"largest batch that fits  --data.batch_size {self.trainer.batch_size}")
        found = (
            "too few steps to tell"
            if self.trainer.rate is None
            else f"--model.lr {self.trainer.rate:.2g}"
        )
        print(f"learning rate            {found} (drawn in {picture})")

    @rank_zero_only
    def after_test(self) -> None:
        self._say_accuracy("test")

    def _say_accuracy(self, split: str) -> None:
        measured = {
            key.removeprefix(f"{split}_"): float(x)
            for key, x in self.trainer.callback_metrics.items()
        }
        if self.model.matrix is not None:
            right, total = int(self.model.matrix.trace()), int(self.model.matrix.sum())
            print(f"accuracy {100 * right / total:.2f} % ({right} of {total} images)")
            measured.pop("accuracy")
        print(", ".join(f"{name} {value:.4f}" for name, value in measured.items()))

    @rank_zero_only
    def after_predict(self) -> None:
        writer = next(part for part in self.trainer.callbacks if isinstance(part, PredictionWriter))
        others = (
            f", the others' in predictions.*.csv of {self.folder}"
            if self.trainer.world_size > 1
            else ""
        )
        print(f"predictions of {writer.count} images lie in {writer.path}{others}")


DEFAULTS = {
    "use_distributed_sampler": False,  # the data module's loaders split the images among processes, each exactly once
    "max_epochs": 30,
    "log_every_n_steps": 10,
    "num_sanity_val_steps": 1,
    "enable_model_summary": False,
}


def construct(kind: type[TrainingCLI], args: list[str] | None = None) -> TrainingCLI:
    """Build the command line of training, which also runs it."""
    with warnings.catch_warnings():
        for message in QUIET:
            warnings.filterwarnings("ignore", f"(?s).*{message}")
        return kind(
            image_classifier,
            ImageData,
            trainer_class=Trainer,
            parser_class=Parser,
            save_config_callback=SavedConfig,
            save_config_kwargs={"overwrite": True},
            trainer_defaults=dict(DEFAULTS),
            seed_everything_default=0,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            args=args,
        )


def main(args: list[str] | None = None) -> None:
    """Run one command of training; exit with 2 and one line where the user can mend what is wrong."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    logging.getLogger("lightning.fabric").setLevel(logging.WARNING)
    try:
        construct(TrainingCLI, args)
    except Interrupted as stop:
        _leave(f"{stop}\n{_resume(stop.checkpoint)}", 128 + stop.number)
    except RuntimeError as error:
        if not lost_worker(error):
            raise
        hint = "too little memory? Try fewer --data.num_workers or a smaller --data.batch_size"
        _leave(f"error: a data worker died; {hint}, and go on with --ckpt_path last", 1)
    except NotFinite as error:
        _leave(
            f"error: {error}; what was saved before stays. Try a lower --model.lr or --trainer.gradient_clip_val 1",
            1,
        )
    except KeyboardInterrupt:
        _leave("stopped at once; what was saved before stays", 130)
    except (MisconfigurationException, ImportError) as error:
        _leave(f"error: {' '.join(str(error).split())}", 2)
    except (ValueError, OSError) as error:
        told = next((link for link in _chain(error) if _deliberate(link)), None)
        if told is None:
            raise
        _leave(f"error: {' '.join(str(told).split())}", 2)


def _resume(checkpoint: Path) -> str:
    config = checkpoint.parent.parent / "config.yaml"
    return f"go on with: {command('train.py')} fit --config {config} --ckpt_path last"


def _leave(message: str, code: int) -> None:
    print(message, file=sys.stderr)
    raise SystemExit(code) from None


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _deliberate(error: BaseException) -> bool:
    """Say whether the error is a refusal, ours or that of Lightning's Trainer, or a full disk: no traceback helps."""
    frame = list(traceback.walk_tb(error.__traceback__))[-1][0]
    refusing = (
        "visattn.",
        "lightning.pytorch.trainer.connectors.",
        "lightning.pytorch.trainer.setup",
    )
    return (
        frame.f_globals.get("__name__", "").startswith(refusing)
        or getattr(error, "errno", 0) == errno.ENOSPC
    )
