"""Draw assets/photos.png: attention between the colors of patches, without training.

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
PATCH = 8  # pixels
SHARPNESS = 2.0
# the marked patch of each photograph, in shares of its height and width
QUERIES = {
    "chelsea": (0.42, 0.42),
    "coffee": (0.62, 0.24),
    "astronaut": (0.57, 0.35),
    "rocket": (0.2, 0.25),
}
NAMES = ("softmax", "entmax15")


class Colors(nn.Module):
    """Attention between patches by mean and standard deviation of their color, standardized."""

    def __init__(self, normalize: str):
        super().__init__()
        self.attend = Attend(SIMILARITIES["negative_l2"](6), NORMALIZERS[normalize]())

    def forward(self, images: Tensor) -> Tensor:
        mean = F.avg_pool2d(images, PATCH)
        spread = (F.avg_pool2d(images**2, PATCH) - mean**2).clamp(min=0).sqrt()
        # (B, 6, h, w) -> (B, N, 6)
        tokens = torch.cat([mean, spread], 1).flatten(2).transpose(1, 2)
        centered = tokens - tokens.mean(1, keepdim=True)
        standardized = centered / tokens.std(1, keepdim=True)
        x = (standardized * SHARPNESS**0.5)[:, None]  # one head: (B, 1, N, 6)
        return self.attend(x, x, x)


def open_photo(name: str) -> Image.Image:
    """Open a photograph, cut to whole patches."""
    photo = Image.open(ASSETS / "photos" / f"{name}.jpg").convert("RGB")
    photo.thumbnail((448, 448))
    columns = photo.width // PATCH
    rows = photo.height // PATCH
    return photo.crop((0, 0, columns * PATCH, rows * PATCH))


def draw_attention(figure, axes, photo: Image.Image, normalize: str, query) -> None:
    model = Colors(normalize)
    with torch.no_grad(), visattn.capture(model) as maps:
        model(to_tensor(photo)[None])
    rows, columns = maps.layers[0].grid
    patch = (int(query[0] * rows), int(query[1] * columns))
    heat = maps.map(query=patch)[0]
    axes.imshow(visattn.overlay(np.asarray(photo), heat, alpha=0.7, vmin=0))
    colors = ScalarMappable(Normalize(0, heat.values.max()), "inferno")
    bar = figure.colorbar(colors, ax=axes, fraction=0.04)
    bar.ax.tick_params(labelsize=7)
    zeros = (heat.values == 0).float().mean().item()
    axes.set_ylabel(f"{normalize}, {zeros:.0%} zero", fontsize=9)


def main() -> None:
    figure = Figure(figsize=(12.5, 6.4), dpi=90, layout="constrained")
    grid = figure.subplots(len(NAMES) + 1, len(QUERIES))
    for column, (name, query) in enumerate(QUERIES.items()):
        photo = open_photo(name)
        grid[0, column].imshow(photo)
        size = f"{photo.width // PATCH} x {photo.height // PATCH} patches"
        grid[0, column].set_title(size, fontsize=9)
        for axes, normalize in zip(grid[1:, column], NAMES, strict=True):
            draw_attention(figure, axes, photo, normalize, query)
        x = query[1] * photo.width
        y = query[0] * photo.height
        for axes in grid[:, column]:
            axes.plot(x, y, "s", mfc="none", mec="cyan", mew=1.6)
            axes.set(xticks=[], yticks=[])
    figure.savefig(ASSETS / "photos.png")


if __name__ == "__main__":
    main()
