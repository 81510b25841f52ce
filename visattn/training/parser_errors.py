"""Say in one line what is wrong with a key of a config or of the command line."""

import re

from visattn.names import suggest

# Keys that the data decide; they cannot be set.
COUNTED_KEYS = ("model.num_classes", "model.multilabel")

TYPE_NAMES = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "str": "text",
    "dict": "a dictionary",
}

LINKED_KEY = re.compile(r"([\w.]+) --> ([\w.]+):")
UNKNOWN_KEY = re.compile(
    r"does not accept option '([\w.]+)'|unrecognized arguments: -*([\w.]+)",
)


def explain_parser_error(message: str, known_keys: list[str]) -> str:
    """Turn an error of jsonargparse into one line that names the key and what would be right."""
    link = LINKED_KEY.search(message)
    if link:
        source, target = link.groups()
        return f"{target} is taken from {source}; set {source} instead"
    unknown = UNKNOWN_KEY.search(message)
    if unknown:
        key = unknown[1] or unknown[2]
        if key in COUNTED_KEYS:
            return f"{key} is counted in the data; leave it out"
        return f"unknown key {key!r}; {suggest(key, known_keys)}"
    wrong_type = explain_wrong_type(message)
    if wrong_type:
        return wrong_type
    return " ".join(message.split())


def explain_wrong_type(message: str) -> str | None:
    """Say that a value has the wrong type; None where the message is about something else."""
    key = re.search(r'Parser key "([\w.]+)"', message)
    value = re.search(r"(?:Given value|Got value): (.*)", message)
    if key is None or value is None:
        return None
    expectation = message.partition("Given value type")[0]
    choices = _literal_choices(expectation)
    if choices:
        return f"{key[1]}: got {value[1]}; {suggest(value[1], choices)}"
    type_names = _type_names(expectation)
    if type_names:
        return f"{key[1]} must be {' or '.join(type_names)}; got {value[1]}"
    return None


def _literal_choices(message: str) -> list[str]:
    """Return the words of every ``Literal['a', 'b', 3]`` in a message, each once."""
    choices: list[str] = []
    for literal in re.findall(r"Literal\[(.*?)\]", message):
        for quoted, bare in re.findall(r"'([^']+)'|(\w+)", literal):
            choices.append(quoted or bare)
    return list(dict.fromkeys(choices))


def _type_names(message: str) -> list[str]:
    """Return the types that a message mentions, in plain words, each once."""
    mentioned = dict.fromkeys(re.findall(r"<class '(\w+)'>", message))
    return [TYPE_NAMES[name] for name in mentioned if name in TYPE_NAMES]
