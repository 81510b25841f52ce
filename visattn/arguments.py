"""From a typed function to a command line, with errors of one line."""

import inspect
import re
import types
import typing
from argparse import ArgumentError
from collections.abc import Callable
from difflib import get_close_matches

from docstring_parser import parse as parse_docstring
from jsonargparse import ArgumentParser


def parse(run: Callable, prog: str, arguments: list[str]) -> dict:
    """Return the arguments of ``run`` as given on a command line; what is wrong is a ValueError of one line."""
    parser = parser_of(run, prog)
    known = [option for action in parser._actions for option in action.option_strings]
    for argument in arguments:
        option = argument.split("=")[0]
        if option.startswith("--") and option not in known:
            near = get_close_matches(option, known, n=1)
            hint = f"; did you mean {near[0]}?" if near else f"; see {prog} --help"
            raise ValueError(f"there is no option {option}{hint}")
    try:
        return vars(parser.parse_args(arguments))
    except ArgumentError as error:
        raise ValueError(_explained(str(error), run)) from None


def parser_of(run: Callable, prog: str) -> ArgumentParser:
    """Build the parser: what may be given without a name is positional, a bool is a flag, the rest are options."""
    doc = parse_docstring(run.__doc__ or "")
    helps = {parameter.arg_name: " ".join((parameter.description or "").split()) for parameter in doc.params}
    parser = ArgumentParser(prog=prog, description=doc.short_description, exit_on_error=False, allow_abbrev=False)
    for name, parameter in inspect.signature(run).parameters.items():
        option, kind = f"--{name.replace('_', '-')}", parameter.annotation
        about = {"help": helps.get(name)}
        if parameter.kind is parameter.POSITIONAL_OR_KEYWORD:
            several = typing.get_origin(kind) is list
            many = {"nargs": "+", "type": typing.get_args(kind)[0]} if several else {"type": kind}
            parser.add_argument(name, **many, **about)
        elif kind is bool:
            parser.add_argument(option, action="store_true", **about)
        elif parameter.default is parameter.empty:
            parser.add_argument(option, type=kind, required=True, **about)
        else:
            parser.add_argument(option, type=kind, default=parameter.default, **about)
    return parser


def _explained(text: str, run: Callable) -> str:
    """Say in one line what jsonargparse says in seven."""
    key, value = re.search(r'Parser key "(\w+)"', text), re.search(r"(?:Given value|Got value): (.*)", text)
    if key is None or value is None:
        return " ".join(text.split())
    kind = inspect.signature(run).parameters[key[1]].annotation
    choices = [choice for part in _parts(kind) for choice in typing.get_args(part) if isinstance(choice, str)]
    near = get_close_matches(value[1], choices, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    wanted = f"one of {', '.join(choices)}" if choices else _words(kind)
    return f"--{key[1].replace('_', '-')} must be {wanted}, got {value[1]!r}{hint}"


def _parts(kind) -> tuple:
    union = isinstance(kind, types.UnionType) or typing.get_origin(kind) is typing.Union
    return typing.get_args(kind) if union else (kind,)


def _words(kind) -> str:
    names = {int: "a whole number", float: "a number", str: "text"}
    return " or ".join(names.get(part, str(part)) for part in _parts(kind) if part is not type(None))
