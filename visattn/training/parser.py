"""The flat keys of configs and command line: which there are, and how they are read."""

import sys
from functools import cache
from typing import Any, Never

import lightning.pytorch as pl
from jsonargparse import ActionConfigFile, Namespace
from lightning.pytorch.cli import LightningArgumentParser

from visattn.data.module import ImageData
from visattn.training.errors import expected_warnings_silenced
from visattn.training.module import ImageClassifier
from visattn.training.parser_errors import explain_parser_error
from visattn.training.recipe import Recipe

COMMANDS = {
    "fit": "Train a classifier and validate it after each epoch.",
    "validate": "Measure a classifier on the validation images.",
    "test": "Measure a classifier on the test images.",
    "predict": "Write the most likely class of each image to predictions.csv.",
    "tune": "Search a learning rate and, on a GPU, the largest batch size.",
}

RUN_KEYS: tuple[tuple[str, Any, Any, str], ...] = (
    ("name", str, "run", "name of the run; its folder is runs/NAME"),
    ("out", str | None, None, "folder of the run, in place of runs/NAME"),
    ("patience", int, 0, "stop after N epochs without a better one; 0 = never"),
    ("checkpoint_steps", int, 0, "save last.ckpt also every N steps; 0 = only after each epoch"),
    (
        "checkpoint_minutes",
        float,
        0.0,
        "save last.ckpt also every N minutes; 0 = only after each epoch",
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
        "validate: also classify images by their N nearest neighbors in feature space; 0 = do not",
    ),
)

TRAINER_DEFAULTS: dict[str, Any] = {
    # the data module's loaders split the images among processes, each image exactly once
    "use_distributed_sampler": False,
    "max_epochs": 30,
    "log_every_n_steps": 10,
    "num_sanity_val_steps": 1,
    "enable_model_summary": False,
}

# Arguments of the Trainer's methods that are objects, not keys.
TRAINER_OBJECTS: set[int | str] = {
    "model",
    "datamodule",
    "dataloaders",
    "train_dataloaders",
    "val_dataloaders",
}


def image_classifier(
    name: str = "vit_nano",
    num_classes: int = 0,
    image_size: int | tuple[int, int] = 64,
    *,
    pretrained: bool = False,
    weights: str | None = None,
    insert: str | None = None,
    where: str = "blocks",
    similarity: str | None = None,
    normalize: str | None = None,
    block: str | None = None,
    options: dict[str, Any] | None = None,
    multilabel: bool = False,
    seed: int = 0,
    compile: bool = False,
    channels_last: bool = False,
    **recipe,
) -> ImageClassifier:
    """Build an ImageClassifier from flat keys: this is the border between configs and code.

    Args:
        name: A model of `create_model`; `timm:NAME` for timm's.
        num_classes: Counted in the data.
        image_size: Side, or height and width, of the images in pixels; the data get the same.
        pretrained: Start from timm's weights (downloads them).
        weights: Start from this file: safetensors, a state dict, or a checkpoint of an earlier run.
        insert: Name of a block to insert into the network.
        where: Where to insert it: a pattern of module names, "stages", "blocks" or
            "after:ClassName".
        similarity: Name of the similarity of query and key.
        normalize: Name of the normalizer that turns scores into weights.
        block: Name of the block in the slots of visattn's own CNNs.
        options: Further options of the model.
        multilabel: Read from the data.
        seed: Taken from seed_everything.
        compile: Compile the network.
        channels_last: Keep images and weights in channels-last memory order.
    """
    all_options = dict(options or {})
    named_options = {"similarity": similarity, "normalize": normalize, "block": block}
    for option, value in named_options.items():
        if value is not None:
            all_options[option] = value
    network = {
        "name": name,
        "num_classes": num_classes,
        "image_size": image_size,
        "pretrained": pretrained,
        "weights": weights,
        "insert": insert,
        "where": where,
        "options": all_options,
    }
    return ImageClassifier(
        network,
        recipe=Recipe(**recipe),
        seed=seed,
        multilabel=multilabel,
        compile=compile,
        channels_last=channels_last,
    )


class TrainingParser(LightningArgumentParser):
    """Say in one line what is wrong with a command or config, and which key was probably meant."""

    # jsonargparse calls it with the exception too
    def error(
        self,
        message: str,
        ex: Exception | None = None,
    ) -> Never:
        explanation = explain_parser_error(str(ex or message), known_keys())
        print(f"error: {explanation}", file=sys.stderr)
        raise SystemExit(2)


@expected_warnings_silenced()
def parse(arguments: list[str] | None = None) -> tuple[str, Namespace]:
    """Read a command line (None: that of this process); return the command and its configuration.

    Raises:
        SystemExit: The arguments are wrong; one line on stderr says how.
    """
    main_parser, _ = _build_parsers()
    config = main_parser.parse_args(arguments)
    command = config.subcommand
    return command, config[command]


def command_parser(command: str) -> TrainingParser:
    """Return the parser of one command."""
    _, parsers = _build_parsers()
    return parsers[command]


def known_keys() -> list[str]:
    """Return the keys of all commands."""
    _, parsers = _build_parsers()
    keys: set[str] = set()
    for parser in parsers.values():
        keys.update(parser.get_defaults(skip_validation=True).keys())
    return sorted(keys)


@cache  # reading the signatures takes most of a second
def _build_parsers() -> tuple[TrainingParser, dict[str, TrainingParser]]:
    """Return the parser of the program and those of its commands."""
    main_parser = _plain_parser("Train, validate, test and use an image classifier.")
    subcommands = main_parser.add_subcommands()
    parsers = {}
    for command, description in COMMANDS.items():
        parser = _plain_parser(description)
        _add_keys(parser, command)
        subcommands.add_subcommand(command, parser, help=description)
        parsers[command] = parser
    return main_parser, parsers


def _plain_parser(description: str) -> TrainingParser:
    parser = TrainingParser(
        description=description,
        allow_abbrev=False,
        dump_header=[f"lightning.pytorch=={pl.__version__}"],
    )
    parser.add_argument(
        "-c", "--config", action=ActionConfigFile, help="Path to a configuration file in YAML."
    )
    return parser


def _add_keys(parser: TrainingParser, command: str) -> None:
    parser.add_argument(
        "--seed_everything",
        type=bool | int,
        default=0,
        help="Seed of weights, order and augmentations; true draws one, false sets none.",
    )
    parser.add_lightning_class_args(pl.Trainer, "trainer")
    parser.set_defaults({f"trainer.{key}": value for key, value in TRAINER_DEFAULTS.items()})
    parser.add_function_arguments(
        image_classifier,
        "model",
        skip={"num_classes", "multilabel"},  # the data decide them
        fail_untyped=False,
        sub_configs=True,
    )
    parser.add_class_arguments(
        ImageData, "data", instantiate=False, fail_untyped=False, sub_configs=True
    )
    for key, key_type, default, description in RUN_KEYS:
        parser.add_argument(f"--{key}", type=key_type, default=default, help=description)
    parser.link_arguments("model.image_size", "data.image_size")
    parser.link_arguments("seed_everything", "data.seed", compute_fn=int)
    parser.link_arguments("seed_everything", "model.seed", compute_fn=int)
    if command != "tune":  # which Lightning's Trainer does not have
        parser.add_method_arguments(pl.Trainer, command, skip=TRAINER_OBJECTS)
