"""Flat keys: the border between configs and code, and what is said about keys that do not exist."""

import re
import sys
from difflib import get_close_matches
from typing import Any

from lightning.pytorch.cli import LightningArgumentParser

from visattn.training.module import ImageClassifier
from visattn.training.recipe import Recipe


def image_classifier(
    name: str = "vit_nano",
    num_classes: int = 0,
    image_size: int | tuple[int, int] = 64,
    *,
    pretrained: bool = False,
    weights: str | None = None,
    insert: str | None = None,
    where: str = "blocks",
    similarity: str | None = None,
    normalize: str | None = None,
    block: str | None = None,
    options: dict[str, Any] | None = None,
    multilabel: bool = False,
    seed: int = 0,
    compile: bool = False,
    channels_last: bool = False,
    **recipe,
) -> ImageClassifier:
    """Build an ImageClassifier from flat keys: this is the border between configs and code.

    Args:
        name: A model of `create_model`; `timm:NAME` for timm's.
        num_classes: Taken from the data.
        image_size: Side, or height and width, of the images in pixels; the data gets the same.
        pretrained: Start from timm's weights (downloads them).
        weights: Start from this file: safetensors, a state dict, or a checkpoint of an earlier run.
        insert: Name of a block to insert into the network.
        where: Where to insert it: a pattern of module names, "stages", "blocks" or
            "after:ClassName".
        similarity: How alike a query and a key are, by name.
        normalize: How scores turn into weights, by name.
        block: Name of the block in the slots of an own CNN.
        options: Further options of the model.
        multilabel: Taken from the data.
        seed: Taken from seed_everything.
        compile: Compile the network.
        channels_last: Keep images and weights in channels-last memory order.
    """
    named = {"similarity": similarity, "normalize": normalize, "block": block}
    network = {
        "name": name,
        "num_classes": num_classes,
        "image_size": image_size,
        "pretrained": pretrained,
        "weights": weights,
        "insert": insert,
        "where": where,
        "options": {
            **(options or {}),
            **{key: value for key, value in named.items() if value is not None},
        },
    }
    switches = {"multilabel": multilabel, "compile": compile, "channels_last": channels_last}
    return ImageClassifier(network, recipe=Recipe(**recipe), seed=seed, **switches)


KINDS = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "str": "text",
    "dict": "a dictionary",
}


class Parser(LightningArgumentParser):
    """Say in one line what is wrong with a command or config, and which key was probably meant."""

    family: list["Parser"]

    def error(self, message: str, ex: Exception | None = None) -> None:
        print(f"error: {self._explain(str(ex or message))}", file=sys.stderr)
        raise SystemExit(2)

    def _explain(self, message: str) -> str:
        link = re.search(r"([\w.]+) --> ([\w.]+):", message)
        if link:
            return f"{link[2]} is taken from {link[1]}; give {link[1]} instead"
        counted = re.search(r'Linked "([\w.]+)" must be given via "data"', message)
        if counted:
            return f"{counted[1]} is counted in the data; leave it out"
        unknown = re.search(
            r"does not accept option '([\w.]+)'|unrecognized arguments: -*([\w.]+)", message
        )
        if unknown:
            key = unknown[1] or unknown[2]
            known = {
                name
                for parser in self.family
                for name in parser.get_defaults(skip_validation=True).keys()
            }
            return f"unknown key {key!r}{nearest(key, sorted(known))}"
        return mistyped(message) or " ".join(
            line.strip() for line in message.splitlines() if line.strip()
        )


def mistyped(message: str) -> str | None:
    """Say in one line that a value has the wrong type, which jsonargparse says in ten."""
    key = re.search(r'Parser key "([\w.]+)"', message)
    value = re.search(r"(?:Given value|Got value): (.*)", message)
    message = message.partition("Given value type")[0]
    words = [
        word
        for part in re.findall(r"Literal\[(.*?)\]", message)
        for word in re.findall(r"'([^']+)'|(\w+)", part)
    ]
    choices = list(dict.fromkeys(quoted or bare for quoted, bare in words))
    kinds = [
        KINDS[kind]
        for kind in dict.fromkeys(re.findall(r"<class '(\w+)'>", message))
        if kind in KINDS
    ]
    if key is None or value is None or not (choices or kinds):
        return None
    wanted = f"one of {', '.join(choices)}" if choices else " or ".join(kinds)
    near = get_close_matches(value[1], choices, n=1)
    return f"{key[1]} must be {wanted}; got {value[1]}" + (
        f"; did you mean {near[0]!r}?" if near else ""
    )


def nearest(key: str, known: list[str]) -> str:
    """Return the words that name the key probably meant: a similar one, or one whose last part is similar."""
    close = get_close_matches(key, known, n=1, cutoff=0.7)
    if not close:
        ends = {name.rpartition(".")[2]: name for name in reversed(known)}
        close = [
            ends[end] for end in get_close_matches(key.rpartition(".")[2], ends, n=1, cutoff=0.6)
        ]
    return f"; did you mean {close[0]!r}?" if close else f"; known are {', '.join(known)}"
