"""Map: the one result type of everything that explains."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Lattice(NamedTuple):
    """Where patches lie: the center of the first one and the steps to the next, as shares of the image's sides.

    A convolution of 3 x 3 with stride 2 and padding 1 looks at pixels around the even ones, not
    around the middles of 2 x 2 squares; three of them in a row leave each patch centered 3.5 pixels
    above and left of the middle of its square of 8 x 8.

    Reference:
        Araujo, Norris, Sim 2019, "Computing Receptive Fields of Convolutional Neural Networks",
        https://distill.pub/2019/computing-receptive-fields. Differs from: places are shares of the
        image, not pixels.

    Example:
        >>> Lattice.tiling((8, 8)).through((4, 4), stride=(4, 4), padding=(0, 0)) == Lattice.tiling((2, 2))
        True
        >>> Lattice.tiling((8, 8)).through((3, 3), stride=(2, 2), padding=(1, 1))
        Lattice(y=0.0625, x=0.0625, down=0.25, right=0.25)
    """

    y: float
    x: float
    down: float
    right: float

    @staticmethod
    def tiling(grid: tuple[int, int]) -> "Lattice":
        """Return the lattice of patches that tile the image."""
        return Lattice(0.5 / grid[0], 0.5 / grid[1], 1 / grid[0], 1 / grid[1])

    def through(
        self, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int]
    ) -> "Lattice":
        """Return the lattice of what a convolution or pooling of this size makes of the patches."""
        y, x = ((size - 1) / 2 - before for size, before in zip(kernel, padding, strict=True))
        return Lattice(
            self.y + self.down * y,
            self.x + self.right * x,
            self.down * stride[0],
            self.right * stride[1],
        )

    def tiles(self, grid: tuple[int, int]) -> bool:
        """Whether these patches are those that tile the image."""
        return all(abs(a - b) < 1e-6 for a, b in zip(self, Lattice.tiling(grid), strict=True))


def resized(
    values: Tensor, size: tuple[int, int], lattice: Lattice | None = None, mode: str = "bilinear"
) -> Tensor:
    """Return maps (B, h, w) interpolated between the centers of their patches, which None takes to tile the image."""
    if lattice is None:
        options = {} if mode.startswith("nearest") else {"align_corners": False}
        return F.interpolate(values[:, None], tuple(size), mode=mode, **options)[:, 0]
    starts, steps = (lattice.y, lattice.x), (lattice.down, lattice.right)
    places = []
    for pixels, patches, start, step in zip(size, values.shape[1:], starts, steps, strict=True):
        number = ((torch.arange(pixels, device=values.device) + 0.5) / pixels - start) / step
        places.append((2 * number / max(1, patches - 1) - 1).to(values.dtype))
    grid = torch.stack(torch.meshgrid(*places, indexing="ij")[::-1], -1).expand(
        len(values), -1, -1, -1
    )
    mode = mode.replace("-exact", "")
    return F.grid_sample(
        values[:, None], grid, mode=mode, padding_mode="border", align_corners=True
    )[:, 0]


@dataclass(frozen=True, repr=False)
class Map:
    """One heat map per image, with what is needed to read it.

    Args:
        values: (B, h, w) float32, or (h, w) for the map of one image. Never stretched: values
            compare across images.
        layer: Name of the layer or layers the map comes from.
        method: Name of the method.
        target: What class-specific methods explained: a class per image, or None.
        prefix_mass: (B,) share of the row that went to class, register and distillation tokens, or
            None.
        notes: Findings a reader should know, such as outlier tokens.
        limits: Smallest and largest value of all the maps a single one was picked from, so that it
            can be drawn on their scale; None for a batch.
        lattice: Where the patches lie, or None where they tile the image.

    Example:
        >>> import torch
        >>> heat = Map(torch.rand(2, 7, 5), method="raw")
        >>> heat[0].values.shape, heat.resize((14, 10)).values.shape, len(heat)
        (torch.Size([7, 5]), torch.Size([2, 14, 10]), 2)
        >>> Map(torch.tensor([[0.0, 0.5]]), "blocks.1.attn", "raw")
        Map(raw at 'blocks.1.attn', (1, 2), 0 to 0.5)
    """

    values: Tensor
    layer: str = ""
    method: str = ""
    target: Tensor | int | None = None
    prefix_mass: Tensor | None = None
    notes: dict = field(default_factory=dict)
    limits: tuple[float, float] | None = None
    lattice: Lattice | None = None

    def __repr__(self) -> str:
        finite = self.values[self.values.isfinite()]
        span = "no finite values"
        if len(finite):
            span = f"{finite.min().item():.3g} to {finite.max().item():.3g}"
        layer = f" at {self.layer!r}" if self.layer else ""
        return f"Map({self.method or 'no method'}{layer}, {tuple(self.values.shape)}, {span})"

    def __len__(self) -> int:
        if self.values.ndim == 2:
            raise TypeError("this is the map of one image and has no length")
        return len(self.values)

    def __getitem__(self, index: int) -> "Map":
        """Return the map of one image."""
        if self.values.ndim == 2:
            raise TypeError("this is already the map of one image")
        one = {
            name: _pick(getattr(self, name), index) for name in ("values", "target", "prefix_mass")
        }
        notes = {name: _pick(value, index) for name, value in self.notes.items()}
        finite = self.values[self.values.isfinite()]
        limits = (finite.min().item(), finite.max().item()) if len(finite) else None
        return replace(self, **one, notes=notes, limits=limits)

    def resize(self, size: tuple[int, int], mode: str = "bilinear") -> "Map":
        """Return the map interpolated to (height, width)."""
        values = self.values if self.values.ndim == 3 else self.values[None]
        values = resized(values, size, self.lattice, mode)
        return replace(self, values=values if self.values.ndim == 3 else values[0], lattice=None)


def _pick(value, index: int):
    return value[index] if isinstance(value, Tensor) and value.ndim > 0 else value
