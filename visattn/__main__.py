"""The `visattn` command: a table of subcommands, each imported only when it is called."""

import sys
from difflib import get_close_matches
from importlib import import_module

COMMANDS = {
    "map": "draw what a model looks at over your photographs",
    "score": "measure over a folder of images which maps tell the truth",
    "blocks": "list the blocks and what they cost here",
    "compare": "train one host with several blocks and compare",
    "bench": "measure what attention, blocks, maps or training cost here",
}

# What the caller can set right; anything else is a defect of the program and keeps its traceback.
_USER_ERRORS = (ValueError, OSError, ImportError)


def main(arguments: list[str] | None = None) -> int:
    """Run ``visattn NAME ...`` and return the exit code: 0, or 2 for what the caller can set right."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] in ("-h", "--help"):
        width = max(map(len, COMMANDS))
        rows = "\n".join(f"  {name:{width}}  {about}" for name, about in COMMANDS.items())
        print(f"visattn COMMAND ...\n\n{rows}\n\nvisattn COMMAND --help tells more; train.py trains.")
        return 0
    name, *rest = arguments
    if name not in COMMANDS:
        near = get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"the commands are {', '.join(COMMANDS)}"
        return _complain("visattn", f"there is no command {name!r}; {hint}")
    return _run(name, rest)


def _run(name: str, arguments: list[str]) -> int:
    prog = f"visattn {name}"
    try:
        from visattn.arguments import parse

        run = import_module(f"visattn.commands.{name}").run
        return run(**parse(run, prog, arguments)) or 0
    except _USER_ERRORS as error:
        return _complain(prog, str(error) or type(error).__name__)
    except KeyboardInterrupt:
        print(f"{prog}: stopped", file=sys.stderr)
        return 130


def _complain(prog: str, message: str) -> int:
    print(f"{prog}: {' '.join(message.split())}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
