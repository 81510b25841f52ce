"""What is kept of an attention call."""

import torch

from visattn.record.entry import Record
from visattn.record.memory import give_back


def check_repeatable(record: Record, keep: str):
    """Refuse to form weights a second time where they are drawn: these would not be the ones that acted."""
    normalize = record.pair[1]
    formed = keep == "maps" or (keep == "rows" and record.kind == "token")
    if formed and getattr(normalize, "stochastic", False) and normalize.training:
        raise ValueError(
            f"keep={keep!r} would draw the weights of {record.name!r} a second time, since {type(normalize).__name__} "
            "is random in training; call model.eval() before the pass"
        )


def keep_parts(record: Record, maps):
    """Keep of a record what ``maps.keep`` asks for, and let go of the rest."""
    if maps.keep == "graph":
        give_back(record.output)
        if record.output.requires_grad:
            record.output.register_hook(give_back)
        return
    output, record.v, record.output = record.output, None, None
    with torch.no_grad():
        if maps.keep == "rows" and record.kind == "token":
            record.row_kept = maps._row(record, "auto").clone()
            record.q = record.k = record.alpha = record.bias = record.mask = None
        elif maps.keep == "maps" and record.q is not None:
            record.alpha = record.weights().clone()
            record.q = record.k = record.bias = record.mask = None
    # A copy, since queries, keys and values are often views of one tensor, and the model may write
    # into its own later.
    for name in ("q", "k", "alpha"):
        held = getattr(record, name)
        setattr(record, name, None if held is None else held.detach().clone())
    for name in ("bias", "mask"):
        held = getattr(record, name)
        setattr(record, name, None if held is None else held.detach())
    if maps.keep != "rows":
        give_back(output)


def number(records: list[Record], record: Record, times: int):
    """Tell the calls of one module apart: name[0], name[1] ..."""
    if times == 2:
        first = next(r for r in records if r.name == record.name)
        first.name = f"{first.name}[0]"
    if times > 1:
        record.name = f"{record.name}[{times - 1}]"
