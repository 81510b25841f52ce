"""From a typed function to a command line, with errors of one line."""

import inspect
import re
import types
import typing
from argparse import ArgumentError
from collections.abc import Callable
from dataclasses import MISSING, Field, fields, is_dataclass
from difflib import get_close_matches
from typing import NamedTuple

from docstring_parser import parse as parse_docstring
from jsonargparse import ArgumentParser


class Option(NamedTuple):
    """What one option of a command line takes."""

    kind: object
    default: object
    positional: bool
    about: str | None


def parse(run: Callable, prog: str, arguments: list[str]) -> dict:
    """Return the arguments of ``run`` as given on a command line; what is wrong is a ValueError of one line."""
    options = options_of(run)
    parser = _parser(options, prog, parse_docstring(run.__doc__ or "").short_description)
    known = [option for action in parser._actions for option in action.option_strings]
    for argument in arguments:
        option = argument.split("=")[0]
        if option.startswith("--") and option not in known:
            near = get_close_matches(option, known, n=1)
            hint = f"; did you mean {near[0]}?" if near else f"; see {prog} --help"
            raise ValueError(f"there is no option {option}{hint}")
    try:
        return _grouped(run, vars(parser.parse_args(arguments)))
    except ArgumentError as error:
        raise ValueError(_explained(str(error), options)) from None


def options_of(run: Callable) -> dict[str, Option]:
    """List the options of a function by name: its parameters, and the fields of those that are dataclasses."""
    abouts, options = _abouts(run), {}
    for name, parameter in inspect.signature(run).parameters.items():
        if is_dataclass(parameter.annotation):
            about = _abouts(parameter.annotation)
            options |= {
                f.name: Option(f.type, _default(f), False, about.get(f.name))
                for f in _fields(parameter)
            }
        else:
            positional = parameter.kind is parameter.POSITIONAL_OR_KEYWORD
            options[name] = Option(
                parameter.annotation, parameter.default, positional, abouts.get(name)
            )
    return options


def _grouped(run: Callable, given: dict) -> dict:
    """Put the values that belong to a dataclass back into one."""
    parameters = inspect.signature(run).parameters
    return {
        name: parameter.annotation(
            **{field.name: given[field.name] for field in _fields(parameter)}
        )
        if is_dataclass(parameter.annotation)
        else given[name]
        for name, parameter in parameters.items()
    }


def _fields(parameter: inspect.Parameter) -> tuple:
    return fields(parameter.annotation)


def _default(field: Field) -> object:
    return inspect.Parameter.empty if field.default is MISSING else field.default


def _abouts(documented) -> dict[str, str]:
    parameters = parse_docstring(documented.__doc__ or "").params
    return {
        parameter.arg_name: " ".join((parameter.description or "").split())
        for parameter in parameters
    }


def _parser(options: dict[str, Option], prog: str, description: str | None) -> ArgumentParser:
    """Build the parser: what may be given without a name is positional, a bool is a flag, the rest are options."""
    parser = ArgumentParser(
        prog=prog, description=description, exit_on_error=False, allow_abbrev=False
    )
    for name, option in options.items():
        flag = f"--{name.replace('_', '-')}"
        if option.positional:
            parser.add_argument(name, **_places(option), help=option.about)
        elif option.kind is bool:
            parser.add_argument(flag, action="store_true", help=option.about)
        elif option.default is inspect.Parameter.empty:
            parser.add_argument(flag, type=option.kind, required=True, help=option.about)
        else:
            parser.add_argument(flag, type=option.kind, default=option.default, help=option.about)
    return parser


def _places(option: Option) -> dict:
    """Say how many values may stand without a name: one, some, or any number where there is a default."""
    if typing.get_origin(option.kind) is not list:
        return {"type": option.kind}
    kind = {"type": typing.get_args(option.kind)[0]}
    if option.default is inspect.Parameter.empty:
        return kind | {"nargs": "+"}
    return kind | {"nargs": "*", "default": list(option.default)}


def _explained(text: str, options: dict[str, Option]) -> str:
    """Say in one line what jsonargparse says in seven."""
    key, value = (
        re.search(r'Parser key "(\w+)"', text),
        re.search(r"(?:Given value|Got value): (.*)", text),
    )
    if key is None or value is None:
        return " ".join(text.split())
    kind = options[key[1]].kind
    choices = [
        choice
        for part in _parts(kind)
        for choice in typing.get_args(part)
        if isinstance(choice, str)
    ]
    near = get_close_matches(value[1], choices, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    wanted = f"one of {', '.join(choices)}" if choices else _words(kind)
    return f"--{key[1].replace('_', '-')} must be {wanted}, got {value[1]!r}{hint}"


def _parts(kind) -> tuple:
    union = isinstance(kind, types.UnionType) or typing.get_origin(kind) is typing.Union
    return typing.get_args(kind) if union else (kind,)


def _words(kind) -> str:
    names = {int: "a whole number", float: "a number", str: "text"}
    return " or ".join(
        names.get(part, str(part)) for part in _parts(kind) if part is not type(None)
    )
