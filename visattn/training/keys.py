"""Flat keys: the border between configs and code, and what is said about keys that do not exist."""

import re
import sys
from difflib import get_close_matches
from typing import Any

from lightning.pytorch.cli import LightningArgumentParser

from visattn.training.module import ImageClassifier, Recipe


def image_classifier(
    name: str = "vit_nano",
    num_classes: int = 0,
    image_size: int | tuple[int, int] = 64,
    *,
    pretrained: bool = False,
    insert: str | None = None,
    where: str = "blocks",
    similarity: str | None = None,
    normalize: str | None = None,
    block: str | None = None,
    options: dict[str, Any] | None = None,
    optimizer: str = "adamw",
    lr: float = 1e-3,
    weight_decay: float = 0.05,
    warmup_epochs: float = 1.0,
    label_smoothing: float = 0.1,
    mixup: float = 0.0,
    cutmix: float = 0.0,
    ema: float = 0.0,
    seed: int = 0,
    compile: bool = False,
    channels_last: bool = False,
) -> ImageClassifier:
    """Build an ImageClassifier from flat keys: this is the border between configs and code.

    Args:
        name: A model of `create_model`; `timm:NAME` for timm's.
        num_classes: Taken from the data.
        image_size: Side, or height and width, of the images in pixels; the data gets the same.
        pretrained: Start from timm's weights (downloads them).
        insert: Name of a block to insert into the network.
        where: Where to insert it: a pattern of module names, "stages", "blocks" or "after:ClassName".
        similarity: How alike a query and a key are, by name.
        normalize: How scores turn into weights, by name.
        block: Name of the block in the slots of an own CNN.
        options: Further options of the model.
        optimizer: A name of timm's optimizers.
        lr: Highest learning rate.
        weight_decay: Weight decay; norms and biases get none.
        warmup_epochs: Epochs of linear warm-up, counted in steps; a cosine to zero follows.
        label_smoothing: Share of the target spread evenly over all classes.
        mixup: Parameter of mixup's Beta distribution; 0 turns it off.
        cutmix: The same of CutMix.
        ema: Decay, such as 0.999, of the running average of the weights that is validated and kept; 0 turns it off.
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
        "insert": insert,
        "where": where,
        "options": {**(options or {}), **{key: value for key, value in named.items() if value is not None}},
    }
    recipe = Recipe(optimizer, lr, weight_decay, warmup_epochs, label_smoothing, mixup, cutmix, ema)
    return ImageClassifier(network, recipe=recipe, seed=seed, compile=compile, channels_last=channels_last)


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
        unknown = re.search(r"does not accept option '([\w.]+)'|unrecognized arguments: -*([\w.]+)", message)
        if unknown:
            key = unknown[1] or unknown[2]
            known = {name for parser in self.family for name in parser.get_defaults(skip_validation=True).keys()}
            return f"unknown key {key!r}{nearest(key, sorted(known))}"
        return " ".join(line.strip() for line in message.splitlines() if line.strip())


def nearest(key: str, known: list[str]) -> str:
    """Return the words that name the key probably meant: a similar one, or one whose last part is similar."""
    close = get_close_matches(key, known, n=1, cutoff=0.7)
    if not close:
        ends = {name.rpartition(".")[2]: name for name in reversed(known)}
        close = [ends[end] for end in get_close_matches(key.rpartition(".")[2], ends, n=1, cutoff=0.6)]
    return f"; did you mean {close[0]!r}?" if close else f"; known are {', '.join(known)}"
