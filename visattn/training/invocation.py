"""How this program was started, so that the commands it proposes work when they are copied."""

import os
import shutil
import sys


def command_words(script: str) -> str:
    """Return the words that start ``script`` (train.py, visattn) as this program was started."""
    if "UV_RUN_RECURSION_DEPTH" in os.environ:  # set by `uv run` for what it starts
        return f"uv run {script}"
    if not script.endswith(".py") and shutil.which(script):
        return script
    python = sys.executable
    if shutil.which("python") == python:
        python = "python"
    if script.endswith(".py"):
        return f"{python} {script}"
    return f"{python} -m {script}"
