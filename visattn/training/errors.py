"""What ends a command early, and which errors the user can correct."""

import errno
import signal
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# Warnings of Lightning and jsonargparse about what is intended here.
EXPECTED_WARNINGS = (
    "does not have many workers",
    "Experiment logs directory",
    "exists and is not empty",
    "is smaller than the logging",
    "isinstance.treespec, LeafSpec.. is deprecated",
    "Be aware that when using `ckpt_path`, callbacks",
    "The dirpath has changed from",
    # the average then starts from the weights of the checkpoint
    "The checkpoint was not created with WeightAveraging",
    # configure_model is overridden for sharded parameters alone
    "WeightAveraging callback with a model that overrides",
    # jsonargparse 4.49 renamed these; older versions know only the earlier names
    "instantiate_classes",
    "skip_none parameter",
    "JsonargparseDeprecationWarning",
)

# Modules whose errors say what the user should change; a traceback would not help.
REFUSING_MODULES = (
    "visattn.",
    "lightning.pytorch.trainer.connectors.",
    "lightning.pytorch.trainer.setup",
)


class Interrupted(Exception):
    """A signal asked training to stop, and the last checkpoint is written."""

    def __init__(self, number: int, checkpoint: Path):
        name = signal.Signals(number).name
        super().__init__(f"stopped by {name}; the state is saved in {checkpoint}")
        self.number = number
        self.checkpoint = checkpoint


class NotFinite(Exception):
    """The loss or a weight became infinite or NaN."""


def is_lost_worker(error: BaseException) -> bool:
    """Whether a data worker died."""
    return isinstance(error, RuntimeError) and "DataLoader worker" in str(error)


def find_refusal(error: BaseException) -> BaseException | None:
    """Return the first error in a chain of causes that tells the user what to correct, or None."""
    link: BaseException | None = error
    while link is not None:
        if _is_refusal(link):
            return link
        link = link.__cause__
    return None


def _is_refusal(error: BaseException) -> bool:
    if getattr(error, "errno", 0) == errno.ENOSPC:  # a full disk
        return True
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    module_name = frames[-1].f_globals.get("__name__", "")
    return module_name.startswith(REFUSING_MODULES)


def one_line(error: BaseException) -> str:
    """Return the message of an error on a single line."""
    return " ".join(str(error).split())


@contextmanager
def expected_warnings_silenced() -> Iterator[None]:
    """Silence the warnings about what is intended here."""
    with warnings.catch_warnings():
        for message in EXPECTED_WARNINGS:
            warnings.filterwarnings("ignore", f"(?s).*{message}")
        yield
