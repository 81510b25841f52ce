"""Attention rollout."""

import torch.nn.functional as F
from torch import Tensor

from visattn.map import Map
from visattn.methods.chain import chain, finished, opening
from visattn.record.entry import Record
from visattn.record.session import Maps

FUSIONS = {"mean": Tensor.mean, "max": Tensor.amax, "min": Tensor.amin}


def rollout(maps: Maps, layers=None, head_fusion: str = "mean") -> Map:
    r"""Follow attention down through all layers, half of it staying on the residual path.

    .. math::
        \bar A_l = \tfrac12 \operatorname{mean}_h A_{lh} + \tfrac12 I, \qquad \text{map} = e\, \bar A_L \cdots \bar A_1

    e is what the head reads: the class token, or all patches alike. Only rows are ever formed: e
    goes down through the layers by one vector-matrix product each.

    Args:
        maps: What `visattn.capture` recorded with keep="qk" or "maps".
        layers: None is all token layers; or a slice, or a list of numbers and names.
        head_fusion: "mean", "max" or "min" over heads; rows of the last two are scaled to sum to
            one.

    Returns:
        Map (B, h, w). Values and ``prefix_mass`` sum to one, but for what went to padding of
        windows (``notes["padding_mass"]``).

    Raises:
        ValueError: ``head_fusion`` is unknown, a layer does not exist, or no layer has tokens.

    Reference:
        Abnar, Zuidema 2020, "Quantifying Attention Flow in Transformers",
        https://arxiv.org/abs/2005.00928. Differs
        from the paper in: windows and grids that change between layers, where a patch shares its
        mass among its children; rows that do not sum to one by their definition (sigmoid ...) are
        scaled to absolute sum one.

    Example:
        >>> import torch
        >>> from visattn.record import capture
        >>> attention = torch.nn.MultiheadAttention(6, 2, batch_first=True)
        >>> with capture(attention, grid=(2, 3)) as maps:
        ...     y = attention(*[torch.rand(1, 6, 6)] * 3)
        >>> round(rollout(maps).values.sum().item(), 4)
        1.0
    """
    if head_fusion not in FUSIONS:
        raise ValueError(f"head_fusion must be one of {', '.join(FUSIONS)}; got {head_fusion!r}")
    records = maps.select(layers)

    def attend(record: Record, u: Tensor) -> Tensor:
        return record.apply(u, _fusion(record, head_fusion))

    def step(record: Record, u: Tensor) -> tuple[Tensor, Tensor]:
        return u / 2, attend(record, u) / 2

    row, rest = opening(maps, records, attend)
    row = chain(rest, row, step)
    padded = any(r.keys.index is not None and (r.keys.index < 0).any() for r in records)
    total = row.patches.sum((1, 2)) + row.prefix.sum(1)
    return finished(row, records, "rollout", **({"padding_mass": 1 - total} if padded else {}))


def _fusion(record: Record, head_fusion: str):
    sums_to_one = getattr(record.pair[1], "rows_sum_to_one", True)
    if head_fusion == "mean":
        return None if sums_to_one else lambda rows: F.normalize(record.rows(rows), p=1, dim=-1)
    return lambda rows: F.normalize(FUSIONS[head_fusion](record.rows(rows), 1), p=1, dim=-1)
