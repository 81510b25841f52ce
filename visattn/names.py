"""Look things up by name, and say what was probably meant."""

from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import TypeVar

T = TypeVar("T")

LONGEST_LIST = 100  # names; beyond it an error message counts them instead


def lookup(table: Mapping[str, T], name: str, argument: str) -> T:
    """Look a name up, or say which names come near and which there are."""
    if name in table:
        return table[name]
    raise ValueError(f"unknown {argument} {name!r}; {suggest(name, table)}")


def suggest(word: str, known: Iterable[str]) -> str:
    """Say what the reader may have meant, then all there is, unless that is a long list."""
    names = list(known)
    matches = get_close_matches(word, names, n=3, cutoff=0.4)
    hint = ""
    if matches:
        hint = f"did you mean {' or '.join(map(repr, matches))}? "
    if len(names) >= LONGEST_LIST:
        return f"{hint}{len(names)} are known"
    return f"{hint}known: {', '.join(names) or 'none'}"
