"""Look things up by name, and say what was probably meant."""

from collections.abc import Iterable, Mapping
from difflib import get_close_matches


def find(table: Mapping, name: str, argument: str):
    """Look a name up, or say which names come near and which there are."""
    if name in table:
        return table[name]
    raise ValueError(f"unknown {argument} {name!r}; {nearest(name, table)}")


def nearest(word: str, known: Iterable[str]) -> str:
    """Say what the reader may have meant, then all there is, unless that is a long list."""
    known = list(known)
    close = get_close_matches(word, known, n=3, cutoff=0.4)
    hint = f"did you mean {' or '.join(map(repr, close))}? " if close else ""
    return f"{hint}known: {', '.join(known) or 'none'}" if len(known) < 100 else f"{hint}{len(known)} are known"
