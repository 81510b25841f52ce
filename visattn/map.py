"""Map: the one result type of everything that explains."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Lattice(NamedTuple):
    """Where patches lie: the center of the first one and the steps to the next.

    All four are shares of the image's height (``y``, ``down``) and width (``x``, ``right``).

    A convolution of 3 x 3 with stride 2 and padding 1 looks at pixels around the even ones, not
    around the middles of 2 x 2 squares; three of them in a row leave each patch centered 3.5 pixels
    above and left of the middle of its square of 8 x 8.

    Reference:
        Araujo, Norris, Sim 2019, "Computing Receptive Fields of Convolutional Neural Networks",
        https://distill.pub/2019/computing-receptive-fields. Differs from: places are shares of the
        image, not pixels.

    Example:
        >>> pixels = Lattice.tiling((8, 8))
        >>> pixels.through((4, 4), stride=(4, 4), padding=(0, 0)) == Lattice.tiling((2, 2))
        True
        >>> pixels.through((3, 3), stride=(2, 2), padding=(1, 1))
        Lattice(y=0.0625, x=0.0625, down=0.25, right=0.25)
    """

    y: float
    x: float
    down: float
    right: float

    @staticmethod
    def tiling(grid: tuple[int, int]) -> "Lattice":
        """Return the lattice of patches that tile the image."""
        rows, columns = grid
        return Lattice(0.5 / rows, 0.5 / columns, 1 / rows, 1 / columns)

    def through(
        self,
        kernel: Sequence[int],
        stride: Sequence[int],
        padding: Sequence[int],
    ) -> "Lattice":
        """Return the lattice of what a convolution or pooling of this size makes of the patches."""
        # the middle of the first window, in patches from the first patch
        middle_y = (kernel[0] - 1) / 2 - padding[0]
        middle_x = (kernel[1] - 1) / 2 - padding[1]
        return Lattice(
            y=self.y + self.down * middle_y,
            x=self.x + self.right * middle_x,
            down=self.down * stride[0],
            right=self.right * stride[1],
        )

    def tiles(self, grid: tuple[int, int]) -> bool:
        """Whether these patches are those that tile the image."""
        tiling = Lattice.tiling(grid)
        pairs = zip(self, tiling, strict=True)
        differences = [abs(a - b) for a, b in pairs]
        return max(differences) < 1e-6


def resized(
    values: Tensor,
    size: tuple[int, int],
    lattice: Lattice | None = None,
    mode: str = "bilinear",
) -> Tensor:
    """Return maps (B, h, w) interpolated between the centers of their patches: (B, H, W).

    ``lattice`` None takes the patches to tile the image.
    """
    maps = values[:, None]  # (B, h, w) -> (B, 1, h, w)
    if lattice is None:
        # align_corners exists for interpolating modes only
        align_corners = None if mode.startswith("nearest") else False
        enlarged = F.interpolate(maps, tuple(size), mode=mode, align_corners=align_corners)
        return enlarged[:, 0]
    _, rows, columns = values.shape
    height, width = size
    y = _sampling_positions(height, rows, lattice.y, lattice.down, values)
    x = _sampling_positions(width, columns, lattice.x, lattice.right, values)
    grid_y, grid_x = torch.meshgrid(y, x, indexing="ij")
    grid = torch.stack([grid_x, grid_y], -1)  # (H, W, 2), x first as grid_sample reads it
    sampled = F.grid_sample(
        maps,
        grid.expand(len(values), -1, -1, -1),
        mode=mode.replace("-exact", ""),
        padding_mode="border",
        align_corners=True,
    )
    return sampled[:, 0]


def _sampling_positions(
    pixels: int,
    patches: int,
    start: float,
    step: float,
    like: Tensor,
) -> Tensor:
    """Return where pixels lie along one side, -1 at the first patch's center and 1 at the last's.

    ``like`` has the device and the precision of the result.
    """
    numbers = torch.arange(pixels, device=like.device)
    centers = (numbers + 0.5) / pixels
    patch_numbers = (centers - start) / step
    # 0 to patches - 1 -> -1 to 1
    positions = 2 * patch_numbers / max(1, patches - 1) - 1
    return positions.to(like.dtype)


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
        limits = self._finite_limits()
        span = "no finite values"
        if limits is not None:
            low, high = limits
            span = f"{low:.3g} to {high:.3g}"
        source = self.method or "no method"
        if self.layer:
            source += f" at {self.layer!r}"
        return f"Map({source}, {tuple(self.values.shape)}, {span})"

    def __len__(self) -> int:
        # (h, w) has a first axis as well, which counts no images
        if self.values.ndim == 2:
            raise TypeError("this is the map of one image and has no length")
        return len(self.values)

    def __getitem__(self, index: int) -> "Map":
        """Return the map of one image."""
        if self.values.ndim == 2:
            raise TypeError("this is already the map of one image")
        notes = {name: _pick(note, index) for name, note in self.notes.items()}
        return replace(
            self,
            values=self.values[index],
            target=_pick(self.target, index),
            prefix_mass=_pick(self.prefix_mass, index),
            notes=notes,
            limits=self._finite_limits(),
        )

    def resize(
        self,
        size: tuple[int, int],
        mode: str = "bilinear",
    ) -> "Map":
        """Return the map interpolated to (height, width)."""
        if self.values.ndim == 3:
            values = resized(self.values, size, self.lattice, mode)
        else:
            values = resized(self.values[None], size, self.lattice, mode)[0]
        return replace(self, values=values, lattice=None)

    def _finite_limits(self) -> tuple[float, float] | None:
        """Return the smallest and the largest finite value, or None where there is none."""
        finite = self.values[self.values.isfinite()]
        if not len(finite):
            return None
        return finite.min().item(), finite.max().item()


def _pick(value, index: int):
    """Return one image's entry of a tensor (B, ...); anything else holds for all images."""
    if isinstance(value, Tensor) and value.ndim > 0:
        return value[index]
    return value
