"""The commands of a user as the journeys run them: train.py on the quickstart's config, cut down to seconds."""

import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parent.parent
SMALL_NETWORK = '{"dim": 16, "depth": 2, "num_heads": 2}'


def command(*words: object) -> list[str]:
    return [sys.executable, str(REPOSITORY / "train.py"), *map(str, words)]


def small_options(out: Path, **changes) -> list[str]:
    """Return the options of a run that takes seconds; ``__`` in a change stands for a dot."""
    options = {
        "config": REPOSITORY / "configs" / "quickstart.yaml",
        "out": out,
        "model.image_size": 24,
        "model.options": SMALL_NETWORK,
        "data.root": REPOSITORY / "assets" / "writing_systems.zip",
        "data.batch_size": 16,
        "data.num_workers": 0,
        "data.mean": "[0.9, 0.9, 0.9]",
        "data.std": "[0.2, 0.2, 0.2]",
        "trainer.accelerator": "cpu",
        "trainer.devices": 1,
        "trainer.limit_train_batches": 9,
        "trainer.max_epochs": 2,
        "overlays": 0,
    }
    for key, value in changes.items():
        options[key.replace("__", ".")] = value
    words = []
    for key, value in options.items():
        words += [f"--{key}", str(value)]
    return words


def run_to_the_end(arguments: list[str]) -> str:
    """Run a command in the repository's root; return what it printed."""
    process = subprocess.run(
        arguments, cwd=REPOSITORY, capture_output=True, text=True, timeout=900, check=False
    )
    assert process.returncode == 0, process.stdout + process.stderr
    return process.stdout
