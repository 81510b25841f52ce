"""Build the network of a classifier: a model by name, with or without an inserted block."""

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
    options: dict | None = None,
) -> nn.Module:
    """Return the network ``name`` of ``create_model``; a block named by ``insert`` is put into it at ``where``.

    ``weights`` may be those of the plain network, or of an earlier run that had the block too.
    """
    given = {
        "num_classes": num_classes,
        "image_size": image_size,
        "pretrained": pretrained,
        **(options or {}),
    }
    if insert is None or weights is None:
        model = create_model(name, weights=weights, **given)
        return model if insert is None else insert_block(model, insert, where)
    model = create_model(name, **given)
    plain = set(model.state_dict())
    model, state = insert_block(model, insert, where), read_weights(weights)
    if (model.state_dict().keys() - plain) & state.keys():
        return load_weights(model, state, weights)
    return insert_block(create_model(name, weights=weights, **given), insert, where)
