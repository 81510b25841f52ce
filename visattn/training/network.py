"""Build the network of a classifier: a model by name, with or without an inserted block."""

from typing import Any

from torch import nn

from visattn.models.presets import create_model
from visattn.models.weights import load_weights, read_weights
from visattn.surgery.inserted import insert as insert_block


def build_network(
    name: str,
    *,
    num_classes: int,
    image_size: int | tuple[int, int],
    pretrained: bool = False,
    weights: str | None = None,
    insert: str | None = None,
    where: str = "blocks",
    options: dict[str, Any] | None = None,
) -> nn.Module:
    """Return a network of ``create_model``, with the block ``insert`` put into it at ``where``.

    ``weights`` may be those of the plain network, or of an earlier run that had the block too.
    """
    arguments = {
        "num_classes": num_classes,
        "image_size": image_size,
        "pretrained": pretrained,
        **(options or {}),
    }
    if insert is None:
        return create_model(name, weights=weights, **arguments)
    if weights is None:
        return insert_block(create_model(name, **arguments), insert, where)

    model = create_model(name, **arguments)
    plain_names = set(model.state_dict())
    model = insert_block(model, insert, where)
    block_names = set(model.state_dict()) - plain_names
    state = read_weights(weights)
    if block_names & state.keys():  # the file has weights of the inserted blocks too
        return load_weights(model, state, weights)
    return insert_block(create_model(name, weights=weights, **arguments), insert, where)
