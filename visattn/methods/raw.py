"""Attention of one layer as it is, and as DINO shows it."""

import torch
from torch import Tensor

from visattn.map import Map
from visattn.methods.chain import checked
from visattn.record.session import Maps


def raw(maps: Maps, layers=None) -> Map:
    r"""Return the weights of the query the head reads, averaged over heads and layers.

    .. math::
        \text{map} = \operatorname{mean}_{l, h}\, e A_{lh}

    Args:
        maps: What `visattn.capture` recorded.
        layers: None is the last token layer (the last layer, where none has tokens); or a number,
            name, slice or list.

    Reference:
        Vaswani et al. 2017, https://arxiv.org/abs/1706.03762. Differs from: nothing.
    """
    if layers is None:
        layers = -1
    if isinstance(layers, (int, str)):
        return checked(maps.map(layers))
    records = maps.select(layers)
    heats = [maps.map(record.name) for record in records]
    grids = {tuple(heat.values.shape[1:]) for heat in heats}
    if len(grids) > 1:
        raise ValueError(
            f"raw averages layers of one grid; these have {', '.join(map(str, sorted(grids)))}"
        )
    values = torch.stack([heat.values for heat in heats])  # (layers, B, h, w)
    heat = Map(
        values.mean(0),
        f"{heats[0].layer} to {heats[-1].layer}",
        "raw",
        prefix_mass=_mean_prefix_mass(heats),
        lattice=heats[0].lattice,
    )
    return checked(heat)


def _mean_prefix_mass(heats: list[Map]) -> Tensor:
    masses = [heat.prefix_mass for heat in heats if heat.prefix_mass is not None]
    return torch.stack(masses).mean(0)


def dino(
    maps: Maps,
    layers=-1,
    head: int | None = None,
    mass: float = 0.6,
) -> Map:
    r"""Return, per patch, the share of heads whose mask holds it.

    The mask of a head holds the fewest patches that together have the share ``mass`` of its row.

    .. math::
        \text{map}_j = \operatorname{mean}_h\, 1\bigl[j \in \operatorname{top}_{m}(e A_{Lh})\bigr]

    Args:
        maps: What `visattn.capture` recorded.
        layers: One token layer: a number or name, or a slice or list that holds one.
        head: One head's mask, in {0, 1}, or None for the share of heads.
        mass: m, the share of the row's mass over patches that a mask holds.

    Reference:
        Caron et al. 2021, "Emerging Properties in Self-Supervised Vision Transformers",
        https://arxiv.org/abs/2104.14294. Differs from the authors' code in: heads are averaged
        unless one is selected.
    """
    if not 0 < mass <= 1:
        raise ValueError(f"mass must lie in (0, 1]; got {mass}")
    chosen = maps.select(layers)
    if len(chosen) > 1:
        names = ", ".join(record.name for record in chosen)
        raise ValueError(
            f"layers must select one layer, whose heads dino shows; got {len(chosen)}: {names}"
        )
    record = chosen[0]
    heads = range(record.heads) if head is None else [head]
    heats = [maps.map(record.name, number) for number in heads]
    # (B, h, w) per head
    masks = [mass_mask(heat.values, mass).float() for heat in heats]
    heat = Map(
        torch.stack(masks).mean(0),
        record.name,
        "dino",
        prefix_mass=_mean_prefix_mass(heats),
        notes={"mass": mass},
        lattice=record.keys.lattice,
    )
    return checked(heat)


def mass_mask(values: Tensor, mass: float) -> Tensor:
    """Return a bool mask of the fewest patches of each map that hold a share of its sum."""
    flat = values.flatten(1)  # (B, h, w) -> (B, h w)
    largest_first, order = flat.sort(dim=1, descending=True)
    sum_of_larger = largest_first.cumsum(1) - largest_first
    inside = sum_of_larger < mass * flat.sum(1, keepdim=True)
    # back from the order of size to the order of patches
    mask = torch.zeros_like(inside).scatter(1, order, inside)
    return mask.unflatten(1, values.shape[1:])
