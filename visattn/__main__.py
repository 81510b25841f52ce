"""The `visattn` command: a table of subcommands, each imported only when it is called."""

import sys
from difflib import get_close_matches
from importlib import import_module
from types import ModuleType

COMMANDS = {
    "map": "draw what a model looks at over your photographs",
    "score": "measure over a folder of images which maps tell the truth",
    "blocks": "list the blocks and what they cost here",
    "compare": "train one host with several blocks and compare",
    "preview": "draw augmented images and the learning rate before a training",
    "pack": "turn a folder of many small images into a few tar shards",
    "export": "write a trained classifier as safetensors, torch.export or ONNX",
    "bench": "measure what attention, blocks, maps or training cost here",
}

# What the caller can set right; anything else is a defect of the program and keeps its traceback.
_USER_ERRORS = (ValueError, OSError, ImportError)


def main(arguments: list[str] | None = None) -> int:
    """Run ``visattn NAME ...`` and return the exit code: 0, or 2 for what the caller can set right."""
    arguments = sys.argv[1:] if arguments is None else arguments
    prog = "visattn"
    try:
        module, rest = _chosen(prog, COMMANDS, "visattn.commands", arguments)
        prog = f"visattn {arguments[0]}" if arguments else prog
        if module is not None and hasattr(module, "PARTS"):
            module, rest = _chosen(prog, module.PARTS, f"visattn.{arguments[0]}", rest)
            prog = " ".join(["visattn", *arguments[:2]])
        if module is None:
            return 0
        from visattn.arguments import parse

        return module.run(**parse(module.run, prog, rest)) or 0
    except _USER_ERRORS as error:
        print(f"{prog}: {' '.join(str(error).split()) or type(error).__name__}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{prog}: stopped", file=sys.stderr)
        return 130


def _chosen(
    prog: str, table: dict[str, str], package: str, arguments: list[str]
) -> tuple[ModuleType | None, list[str]]:
    """Import the module that the first argument names; without one, or for help, print the table."""
    if not arguments or arguments[0] in ("-h", "--help"):
        width = max(map(len, table))
        print(
            f"{prog} COMMAND ...\n",
            *(f"  {name:{width}}  {about}" for name, about in table.items()),
            sep="\n",
        )
        print(f"\n{prog} COMMAND --help tells more.")
        return None, []
    name, *rest = arguments
    if name not in table:
        near = get_close_matches(name, table, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(table)}"
        raise ValueError(f"there is no command {name!r}; {hint}")
    return import_module(f"{package}.{name}"), rest


if __name__ == "__main__":
    sys.exit(main())
