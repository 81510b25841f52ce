"""The `visattn` command: typed functions as subcommands, each imported when it is called."""

import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import version

from cyclopts import App, CycloptsError, Parameter

from visattn.names import lookup

COMMANDS = {
    "map": "draw what a model looks at over your photographs",
    "score": "measure over a folder of images which maps tell the truth",
    "blocks": "list the blocks and what they cost here",
    "compare": "train one host with several blocks and compare",
    "preview": "draw augmented images and the learning rate before a training",
    "pack": "turn a folder of many small images into a few tar shards",
    "export": "write a trained classifier as safetensors, torch.export or ONNX",
}

BENCHMARKS = {
    "attention": "every similarity x normalizer: how it is evaluated, and what that costs",
    "blocks": "every block: time, memory, parameters",
    "maps": "rollout, GAE and class-token rows against eager capture",
    "gpu": "attention, maps, training steps and gates on a GPU, with a report",
    "data": "images/s that one core reads and augments, and the start with many files",
    "train": "fit against a plain training loop, and the own ViT against timm's",
}

# What the caller can set right; anything else is a defect of the program and keeps its traceback.
USER_ERRORS = (CycloptsError, ValueError, OSError, ImportError)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``visattn NAME ...``; return 0, 1 for a part left out, or 2 for a wrong call."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        check_names(words)
        code = make_app(words)(words)
    except USER_ERRORS as error:
        print(f"{command_name(words)}: {one_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{command_name(words)}: stopped", file=sys.stderr)
        return 130
    return code or 0


def check_names(words: Sequence[str]) -> None:
    """Refuse an unknown command before any module is imported."""
    if words and not words[0].startswith("-"):
        lookup({**COMMANDS, "bench": ""}, words[0], "command")
    if words[:1] == ["bench"] and len(words) > 1 and not words[1].startswith("-"):
        lookup(BENCHMARKS, words[1], "benchmark")


def make_app(words: Sequence[str] = ()) -> App:
    """Build the command line; only the module of the command that the words name is imported."""
    app = App(
        name="visattn",
        help="Attention for images: maps, scores, blocks and data from the command line.",
        version=lambda: version("visattn"),
        # A flag has no --no-flag beside it.
        default_parameter=Parameter(negative=()),
        help_format="markdown",
        exit_on_error=False,
        print_error=False,
        suppress_keyboard_interrupt=False,
        result_action="return_value",
    )
    bench = App(name="bench", help="measure what attention, blocks, maps or training cost here")
    register(app, "visattn.commands", COMMANDS, words[:1])
    register(bench, "visattn.bench", BENCHMARKS, words[1:2])
    app.command(bench)
    return app


def register(app: App, package: str, table: Mapping[str, str], typed: Sequence[str]) -> None:
    """Add ``run`` of each module in a package; the typed one shows its docstring as help."""
    for name, summary in table.items():
        text = None if name in typed else summary
        app.command(f"{package}.{name}:run", name=name, help=text)


def command_name(words: Sequence[str]) -> str:
    """Return how the command that the words call is named, as far as they name one."""
    names = []
    table = {**COMMANDS, "bench": ""}
    for word in words[:2]:
        if word not in table:
            break
        names.append(word)
        table = BENCHMARKS if word == "bench" else {}
    return " ".join(["visattn", *names])


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


if __name__ == "__main__":
    sys.exit(main())
