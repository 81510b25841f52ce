"""The command line of training: flat keys in, one run folder out, one line for whatever is wrong."""

import errno
import logging
import sys
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path

from lightning.pytorch.cli import LightningCLI, SaveConfigCallback
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from visattn.data.module import ImageData
from visattn.training.checkpoint import KEY, find_checkpoint, read_checkpoint, readable_checkpoint
from visattn.training.keys import Parser, image_classifier
from visattn.training.predictions import PredictionWriter
from visattn.training.run import Report, claim
from visattn.training.stopping import Interrupted, NotFinite
from visattn.training.wiring import callbacks, loggers

QUIET = (  # warnings of Lightning about what is meant to be so
    "does not have many workers",
    "Experiment logs directory",
    "exists and is not empty",
    "is smaller than the logging",
    "isinstance.treespec, LeafSpec.. is deprecated",
    "Be aware that when using `ckpt_path`, callbacks",
    "The dirpath has changed from",
    "The checkpoint was not created with WeightAveraging",  # then both start from its weights
    "args parameter is intended to run from within Python",
    "instantiate_classes",  # Lightning's own use of older names of jsonargparse, three lines
    "skip_none parameter",
    "JsonargparseDeprecationWarning",
)

KEYS = (
    ("name", str, "run", "name of the run: it lies in runs/NAME"),
    ("out", str | None, None, "folder of the run, in place of runs/NAME"),
    ("patience", int, 0, "stop after so many epochs without a better one; 0 = never"),
    ("checkpoint_steps", int, 0, "save last.ckpt every so many steps too; 0 = only after each epoch"),
    ("checkpoint_minutes", float, 0.0, "save last.ckpt every so many minutes too; 0 = only after each epoch"),
    ("overlays", int, 6, "number of validation images whose attention is drawn after each epoch; 0 = none"),
)


class SaveConfig(SaveConfigCallback):
    """Save config.yaml into the run's folder when training starts, and only then."""

    def setup(self, trainer, pl_module, stage: str) -> None:
        if stage == "fit":
            super().setup(trainer, pl_module, stage)


class TrainingCLI(LightningCLI):
    """fit, validate, test and predict an ImageClassifier on ImageData, with everything about a run in one folder."""

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
        parser.link_arguments("data", "model.num_classes", compute_fn=self._count_classes, apply_on="instantiate")

    def _count_classes(self, data: ImageData) -> int:
        if self.subcommand == "predict":
            return len(self.checkpoint_classes)
        data.prepare_data()
        data.setup()
        return data.num_classes

    def _parse_ckpt_path(self) -> None:
        """Do nothing: keys come from config and command line, never from a checkpoint behind the user's back."""

    def before_instantiate_classes(self) -> None:
        config = self.config[self.subcommand]
        self.folder = Path(config.out or Path("runs", config.name))
        config.weights_only = True
        self.resumed_step, self.checkpoint_classes = None, []
        if self.subcommand != "fit":
            config.ckpt_path = config.ckpt_path or "best"
        if "verbose" in config:
            config.verbose = False  # one line of our own says it
        if config.ckpt_path:
            self._choose_checkpoint(config)

    def _choose_checkpoint(self, config) -> None:
        path, problem = Path(config.ckpt_path), ""
        if config.ckpt_path in ("best", "last"):
            path, problem = readable_checkpoint(self.folder, config.ckpt_path)
        elif path.is_dir():
            path = find_checkpoint(path, "last" if self.subcommand == "fit" else "best")
        content = read_checkpoint(path)
        self.resumed_step, self.checkpoint_classes = content["global_step"], content[KEY]["classes"]
        if problem:
            print(f"{problem}; using {path}")
        config.ckpt_path = str(path)

    def instantiate_trainer(self, **kwargs):
        config = self.config_init[self.subcommand]
        fit = self.subcommand == "fit"
        if fit and rank_zero_only.rank == 0:  # model and data stand: a misspelt name moves no earlier run aside
            notice = claim(self.folder, resumed=bool(config.ckpt_path))
            if notice:
                print(notice)
        if config.trainer.logger in (None, True):
            kwargs["logger"] = loggers(self.folder, self.resumed_step) if fit else False
        kwargs |= {"default_root_dir": str(self.folder), "enable_checkpointing": fit}
        added = callbacks(config, self.folder, config.model.recipe) if fit else [PredictionWriter(self.folder)]
        self.trainer_defaults["callbacks"] = added
        return super().instantiate_trainer(**kwargs)

    @rank_zero_only
    def after_fit(self) -> None:
        best = next(part.best for part in self.trainer.callbacks if isinstance(part, Report))
        if "epoch" in best:
            print(f"\nvalidation accuracy  {100 * best['val_accuracy']:.2f} % (best, epoch {best['epoch'] + 1})")
        print(f"the run lies in      {self.folder}")
        sample = self.folder / "attention" / "sample.png"
        if sample.is_file():
            print(f"see what it saw      uv run visattn map {sample} --model {self.folder} --out out/")

    @rank_zero_only
    def after_validate(self) -> None:
        self._say_accuracy()

    @rank_zero_only
    def after_test(self) -> None:
        self._say_accuracy()

    def _say_accuracy(self) -> None:
        right, total = int(self.model.matrix.trace()), int(self.model.matrix.sum())
        print(f"accuracy {100 * right / total:.2f} % ({right} of {total} images)")

    @rank_zero_only
    def after_predict(self) -> None:
        print(f"predictions of {self.trainer.callbacks[0].count} images lie in {self.folder / 'predictions.csv'}")


DEFAULTS = {
    "use_distributed_sampler": False,  # the data module's loaders split the images among processes, each exactly once
    "max_epochs": 30,
    "log_every_n_steps": 10,
    "num_sanity_val_steps": 1,
    "enable_model_summary": False,
}


def main(args: list[str] | None = None) -> None:
    """Run one command of training; exit with 2 and one line where the user can mend what is wrong."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    logging.getLogger("lightning.fabric").setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            for message in QUIET:
                warnings.filterwarnings("ignore", f"(?s).*{message}")
            TrainingCLI(
                image_classifier,
                ImageData,
                parser_class=Parser,
                save_config_callback=SaveConfig,
                save_config_kwargs={"overwrite": True},
                trainer_defaults=dict(DEFAULTS),
                seed_everything_default=0,
                auto_configure_optimizers=False,
                load_from_checkpoint_support=False,
                args=args,
            )
    except Interrupted as stop:
        _leave(f"{stop}\n{_resume(stop.checkpoint)}", 128 + stop.number)
    except NotFinite as error:
        _leave(
            f"error: {error}; what was saved before stays. Try a lower --model.lr or --trainer.gradient_clip_val 1", 1
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
    return f"go on with: uv run train.py fit --config {checkpoint.parent.parent / 'config.yaml'} --ckpt_path last"


def _leave(message: str, code: int) -> None:
    print(message, file=sys.stderr)
    raise SystemExit(code) from None


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _deliberate(error: BaseException) -> bool:
    """Say whether the error is one that this package raised on purpose, or a full disk: no traceback helps there."""
    frame = list(traceback.walk_tb(error.__traceback__))[-1][0]
    return frame.f_globals.get("__name__", "").startswith("visattn.") or getattr(error, "errno", 0) == errno.ENOSPC
