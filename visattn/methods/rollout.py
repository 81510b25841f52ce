"""Attention rollout."""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from visattn.map import Map
from visattn.methods.chain import chain, finished, opening
from visattn.record.entry import Record
from visattn.record.session import Maps

FUSIONS: dict[str, Callable[..., Tensor]] = {
    "mean": Tensor.mean,
    "max": Tensor.amax,
    "min": Tensor.amin,
}


def rollout(
    maps: Maps,
    layers=None,
    head_fusion: str = "mean",
) -> Map:
    r"""Follow attention down through all layers, half of it staying on the residual path.

    .. math::
        \bar A_l = \tfrac12 \operatorname{mean}_h A_{lh} + \tfrac12 I, \qquad
        \text{map} = e\, \bar A_L \cdots \bar A_1

    e is what the head reads: the class token, or all patches alike. Only rows are formed: e goes
    down through the layers by one vector-matrix product each.

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
        https://arxiv.org/abs/2005.00928. Differs from the paper in: windows and grids that change
        between layers, where a patch shares its mass among its children; rows that do not sum to
        one by their definition (sigmoid ...) are scaled to absolute sum one.

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
        return record.apply(u, _fused_rows(record, head_fusion))

    def step(record: Record, u: Tensor) -> tuple[Tensor, Tensor]:
        return u / 2, attend(record, u) / 2

    top, below = opening(maps, records, attend)
    row = chain(below, top, step)
    if not any(_has_padding(record) for record in records):
        return finished(row, records, "rollout")
    # what did not arrive at a token of the picture, (B,)
    patch_mass = row.patches.sum((1, 2))
    mass = patch_mass + row.prefix.sum(1)
    return finished(row, records, "rollout", padding_mass=1 - mass)


def _has_padding(record: Record) -> bool:
    """Whether windows of a layer are filled up with tokens outside the picture."""
    index = record.keys.index
    return index is not None and bool((index < 0).any())


def _fused_rows(record: Record, head_fusion: str) -> Callable[[slice], Tensor] | None:
    """Return the rows that stand for all heads; None is the plain mean of a record."""
    sums_to_one = getattr(record.pair[1], "rows_sum_to_one", True)
    if head_fusion == "mean" and sums_to_one:
        return None

    def fused(rows: slice) -> Tensor:
        weights = record.rows(rows)  # (B * G, H, rows, Nk)
        if head_fusion != "mean":
            weights = FUSIONS[head_fusion](weights, 1)
        return F.normalize(weights, p=1, dim=-1)

    return fused
