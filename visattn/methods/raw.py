"""Attention of one layer as it is, and as DINO shows it."""

import torch
from torch import Tensor

from visattn.map import Map
from visattn.methods.chain import checked
from visattn.record.session import Maps


def raw(maps: Maps, layers=None) -> Map:
    r"""Return the weights of the query the head reads, averaged over heads and over the layers asked for.

    .. math::
        \text{map} = \operatorname{mean}_{l, h}\, e A_{lh}

    Args:
        maps: What `visattn.capture` recorded.
        layers: None is the last token layer (the last layer, where none has tokens); or a number,
            name, slice or list.

    Reference:
        Vaswani et al. 2017, https://arxiv.org/abs/1706.03762. Differs from: nothing.
    """
    if layers is None or isinstance(layers, (int, str)):
        return checked(maps.map(-1 if layers is None else layers))
    heats = [maps.map(record.name) for record in maps.select(layers)]
    sizes = {tuple(heat.values.shape) for heat in heats}
    if len(sizes) > 1:
        raise ValueError(
            f"raw averages layers of one grid; these have {', '.join(map(str, sorted(sizes)))}"
        )
    values, mass = (
        torch.stack([getattr(h, name) for h in heats]).mean(0) for name in ("values", "prefix_mass")
    )
    name = f"{heats[0].layer} to {heats[-1].layer}"
    return checked(Map(values, name, "raw", prefix_mass=mass, lattice=heats[0].lattice))


def dino(maps: Maps, layers=-1, head: int | None = None, mass: float = 0.6) -> Map:
    r"""Return, per patch, the share of heads that keep it among the fewest patches holding most of the attention.

    .. math::
        \text{map}_j = \operatorname{mean}_h\, 1\bigl[\, j \in \operatorname{top}_{m}(e A_{Lh}) \,\bigr]

    Args:
        maps: What `visattn.capture` recorded.
        layers: One token layer: a number or name, or a slice or list that holds one.
        head: One head's mask, in {0, 1}, or None for the share of heads.
        mass: m, the share of the row's mass over patches that a mask holds.

    Reference:
        Caron et al. 2021, "Emerging Properties in Self-Supervised Vision Transformers",
        https://arxiv.org/abs/2104.14294. Differs from the authors' code in: heads are averaged
        unless one is asked for.
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
    heats = [maps.map(record.name, h) for h in (range(record.heads) if head is None else [head])]
    values = torch.stack([mass_mask(heat.values, mass).float() for heat in heats]).mean(0)
    prefix_mass = torch.stack([heat.prefix_mass for heat in heats]).mean(0)
    about = {"prefix_mass": prefix_mass, "notes": {"mass": mass}, "lattice": record.keys.lattice}
    return checked(Map(values, record.name, "dino", **about))


def mass_mask(values: Tensor, mass: float) -> Tensor:
    """Return the fewest patches of each map (B, h, w) that hold a share of its sum, as a bool mask."""
    flat = values.flatten(1)
    ordered, order = flat.sort(dim=1, descending=True)
    before = ordered.cumsum(1) - ordered
    kept = before < mass * flat.sum(1, keepdim=True)
    return torch.zeros_like(kept).scatter(1, order, kept).unflatten(1, values.shape[1:])
