"""How this program was started, so that the commands it proposes work when they are copied."""

import os
import shutil
import sys


def command_words(script: str) -> str:
    """Return the words that start ``script``, train.py or visattn, the way this program was started."""
    if "UV_RUN_RECURSION_DEPTH" in os.environ:  # set by `uv run` for what it starts
        return f"uv run {script}"
    python = "python" if shutil.which("python") == sys.executable else sys.executable
    if script.endswith(".py"):
        return f"{python} {script}"
    return script if shutil.which(script) else f"{python} -m {script}"
