"""Draw assets/photos.png: what patches of photographs attend by their colors alone, with nothing learned.

Run from the project's folder: uv run assets/draw_photos.py
"""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms.functional import to_tensor

import visattn
from visattn.core import NORMALIZERS, SIMILARITIES, Attend

ASSETS = Path(__file__).parent
PATCH, SHARPNESS = 8, 2.0
# the marked place of each photograph, in shares of its height and width
QUERIES = {
    "chelsea": (0.42, 0.42),
    "coffee": (0.62, 0.24),
    "astronaut": (0.57, 0.35),
    "rocket": (0.2, 0.25),
}
NAMES = ("softmax", "entmax15")


class Colors(nn.Module):
    """Attention between the patches of a photograph by their mean color and its spread, standardized."""

    def __init__(self, normalize: str):
        super().__init__()
        self.attend = Attend(SIMILARITIES["negative_l2"](6), NORMALIZERS[normalize]())

    def forward(self, images: Tensor) -> Tensor:
        mean = F.avg_pool2d(images, PATCH)
        spread = (F.avg_pool2d(images**2, PATCH) - mean**2).clamp(min=0).sqrt()
        tokens = torch.cat([mean, spread], 1).flatten(2).transpose(1, 2)
        tokens = (
            (tokens - tokens.mean(1, keepdim=True)) / tokens.std(1, keepdim=True) * SHARPNESS**0.5
        )
        return self.attend(*[tokens[:, None]] * 3)


def cropped(name: str) -> Image.Image:
    photo = Image.open(ASSETS / "photos" / f"{name}.jpg").convert("RGB")
    photo.thumbnail((448, 448))
    return photo.crop((0, 0, photo.width // PATCH * PATCH, photo.height // PATCH * PATCH))


def main() -> None:
    figure = Figure(figsize=(12.5, 6.4), dpi=90, layout="constrained")
    grid = figure.subplots(len(NAMES) + 1, len(QUERIES))
    for column, (name, (down, right)) in enumerate(QUERIES.items()):
        photo = cropped(name)
        grid[0, column].imshow(photo)
        grid[0, column].set_title(
            f"{photo.width // PATCH} x {photo.height // PATCH} patches", fontsize=9
        )
        for axes, normalize in zip(grid[1:, column], NAMES, strict=True):
            model = Colors(normalize)
            with torch.no_grad(), visattn.capture(model) as maps:
                model(to_tensor(photo)[None])
            rows, columns = maps.layers[0].grid
            heat = maps.map(query=(int(down * rows), int(right * columns)))[0]
            axes.imshow(visattn.overlay(np.asarray(photo), heat, alpha=0.7, vmin=0))
            bar = figure.colorbar(
                ScalarMappable(Normalize(0, heat.values.max()), "inferno"), ax=axes, fraction=0.04
            )
            bar.ax.tick_params(labelsize=7)
            axes.set_ylabel(
                f"{normalize}, {(heat.values == 0).float().mean():.0%} zero", fontsize=9
            )
        for axes in grid[:, column]:
            axes.plot(
                right * photo.width, down * photo.height, "s", mfc="none", mec="cyan", mew=1.6
            )
            axes.set(xticks=[], yticks=[])
    figure.savefig(ASSETS / "photos.png")


if __name__ == "__main__":
    main()
