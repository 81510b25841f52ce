"""The command line of training: flat keys in, one run folder out, one line per error."""

import logging
import sys
from pathlib import Path
from typing import NoReturn

from lightning.pytorch.utilities.exceptions import MisconfigurationException

from visattn.training import run
from visattn.training.errors import (
    Interrupted,
    NotFinite,
    find_refusal,
    is_lost_worker,
    one_line,
)
from visattn.training.invocation import command_words
from visattn.training.parser import parse

COMMANDS = {
    "fit": run.fit,
    "validate": run.validate,
    "test": run.test,
    "predict": run.predict,
    "tune": run.tune,
}


def main(arguments: list[str] | None = None) -> None:
    """Run one command of training.

    Raises:
        SystemExit: 2 with one line where the user can correct what is wrong; 1 where training
            failed; 128 + N after signal N.
    """
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    logging.getLogger("lightning.fabric").setLevel(logging.WARNING)
    try:
        command, config = parse(arguments)
        COMMANDS[command](config)
    except Interrupted as stop:
        _leave(f"{stop}\n{_resume_hint(stop.checkpoint)}", 128 + stop.number)
    except NotFinite as error:
        hint = "Try a lower --model.lr or --trainer.gradient_clip_val 1"
        _leave(f"error: {error}; earlier checkpoints remain. {hint}", 1)
    except KeyboardInterrupt:
        _leave("stopped at once; earlier checkpoints remain", 130)
    except RuntimeError as error:
        if not is_lost_worker(error):
            raise
        hint = "too little memory? Try fewer --data.num_workers or a smaller --data.batch_size"
        _leave(f"error: a data worker died; {hint}, and resume with --ckpt_path last", 1)
    except (MisconfigurationException, ImportError) as error:
        _leave(f"error: {one_line(error)}", 2)
    except (ValueError, OSError) as error:
        refusal = find_refusal(error)
        if refusal is None:  # a defect of the program keeps its traceback
            raise
        _leave(f"error: {one_line(refusal)}", 2)


def _resume_hint(checkpoint: Path) -> str:
    config = checkpoint.parent.parent / "config.yaml"
    return f"resume with: {command_words('train.py')} fit --config {config} --ckpt_path last"


def _leave(message: str, code: int) -> NoReturn:
    print(message, file=sys.stderr)
    raise SystemExit(code) from None
