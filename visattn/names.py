"""Tables of named things: look a name up, print the table, and say what was probably meant."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from difflib import get_close_matches
from typing import TypeVar

T = TypeVar("T")

LONGEST_LIST = 100  # names; beyond it an error message counts them instead


class NamedTable(Mapping[str, T]):
    """A read-only mapping that prints as a table, one line per entry.

    ``columns`` maps the header of a column to the function that reads it from an entry.
    """

    def __init__(self, entries: Mapping[str, T], columns: Mapping[str, Callable[[T], object]]):
        self._entries = dict(entries)
        self._columns = dict(columns)

    def __getitem__(self, name: str) -> T:
        return self._entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __repr__(self) -> str:
        lines = [["name", *self._columns]]
        for name, entry in self._entries.items():
            cells = [str(read(entry)) for read in self._columns.values()]
            lines.append([name, *cells])
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        padded = ["  ".join(map(str.ljust, line, widths)).rstrip() for line in lines]
        return "\n".join(padded)


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
