"""Map: the one result type of everything that explains."""

from dataclasses import dataclass, field, replace

import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Map:
    """One heat map per image, with what is needed to read it.

    Args:
        values: (B, h, w) float32, or (h, w) for the map of one image. Never stretched: values compare across images.
        layer: Name of the layer or layers the map comes from.
        method: Name of the method.
        target: What class-specific methods explained: a class per image, or None.
        prefix_mass: (B,) share of the row that went to class, register and distillation tokens, or None.
        notes: Findings a reader should know, such as outlier tokens.
        limits: Smallest and largest value of all the maps a single one was picked from, so that it can be drawn on
            their scale; None for a batch.

    Example:
        >>> import torch
        >>> heat = Map(torch.rand(2, 7, 5), method="raw")
        >>> heat[0].values.shape, heat.resize((14, 10)).values.shape, len(heat)
        (torch.Size([7, 5]), torch.Size([2, 14, 10]), 2)
    """

    values: Tensor
    layer: str = ""
    method: str = ""
    target: Tensor | int | None = None
    prefix_mass: Tensor | None = None
    notes: dict = field(default_factory=dict)
    limits: tuple[float, float] | None = None

    def __len__(self) -> int:
        if self.values.ndim == 2:
            raise TypeError("this is the map of one image and has no length")
        return len(self.values)

    def __getitem__(self, index: int) -> "Map":
        """Return the map of one image."""
        if self.values.ndim == 2:
            raise TypeError("this is already the map of one image")
        one = {name: _pick(getattr(self, name), index) for name in ("values", "target", "prefix_mass")}
        notes = {name: _pick(value, index) for name, value in self.notes.items()}
        finite = self.values[self.values.isfinite()]
        limits = (finite.min().item(), finite.max().item()) if len(finite) else None
        return replace(self, **one, notes=notes, limits=limits)

    def resize(self, size: tuple[int, int], mode: str = "bilinear") -> "Map":
        """Return the map interpolated to (height, width)."""
        values = self.values if self.values.ndim == 3 else self.values[None]
        options = {} if mode.startswith("nearest") else {"align_corners": False}
        values = F.interpolate(values[:, None], tuple(size), mode=mode, **options)[:, 0]
        return replace(self, values=values if self.values.ndim == 3 else values[0])


def _pick(value, index: int):
    return value[index] if isinstance(value, Tensor) and value.ndim > 0 else value
