"""Draw assets/formula.png: one row of scores through every normalizer, and what relations read.

Run from the project's folder: uv run assets/draw_formula.py
"""

from pathlib import Path

import torch
from matplotlib.figure import Figure

from visattn.core.attention import RELATIONS
from visattn.core.normalize import NORMALIZERS

GRID = 8
OPTIONS = {
    "window": {"window_size": 4},
    "shifted_window": {"window_size": 4},
    "grid": {"window_size": 4},
    "neighborhood": {"kernel_size": 3},
    "memory": {"normalize": NORMALIZERS["softmax"]()},
}
CAPTIONS = {
    "self": "self",
    "cross": "cross\n(query of another set)",
    "class": "class\n(query: the class token)",
    "pool": "pool\n(learned query)",
    "memory": "memory, normalize=Softmax()\n(learned keys)",
    "window": "window\nwindow_size=4",
    "shifted_window": "shifted_window\nwindow_size=4",
    "grid": "grid\nwindow_size=4",
    "axial": "axial\n(its column, then its row)",
    "criss_cross": "criss_cross",
    "neighborhood": "neighborhood\nkernel_size=3",
    "channel": "channel\n(channels meet channels)",
}
QUERY = (2, 5)
SIDE = 14  # of the grid whose scores are normalized


def make_scores() -> torch.Tensor:
    """Return scores of one query over a 14 x 14 grid: two bumps and a little noise."""
    side = torch.arange(float(SIDE))
    y, x = torch.meshgrid(side, side, indexing="ij")
    high_bump = 5 * torch.exp(-((y - 4) ** 2 + (x - 5) ** 2) / 6)
    low_bump = 3.5 * torch.exp(-((y - 10) ** 2 + (x - 10) ** 2) / 3)
    noise = torch.randn(SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    return high_bump + low_bump - 1 + 0.3 * noise


def make_other_queries(scores: torch.Tensor) -> torch.Tensor:
    """Return scores (195, 196) of other queries: the upper bump, shifted a little.

    The normalizers double and sinkhorn look at all queries.
    """
    generator = torch.Generator().manual_seed(1)
    count = SIDE * SIDE - 1
    shifts = (3 * torch.randn(count, 2, generator=generator)).int().tolist()
    is_upper = torch.arange(SIDE)[:, None] < 10
    rows = [(scores * is_upper).roll(shift, (0, 1)).flatten() for shift in shifts]
    return torch.stack(rows)


def draw_normalizers(figure) -> None:
    scores = make_scores()
    queries = torch.cat([scores.view(1, -1), make_other_queries(scores)])
    panels = figure.subplots(3, 5).flat
    draw_values(panels[0], "scores e", scores, scores.min().item())
    for i, (name, normalizer) in enumerate(NORMALIZERS.items(), 1):
        alpha = normalizer().eval()(queries[None, None])  # (1, 1, 196, 196)
        values = alpha[0, 0, 0].view(SIDE, SIDE).detach()
        zeros = (values == 0).float().mean().item()
        total = f"\nsum {values.sum().item():.2f}, {zeros:.0%} zero"
        draw_values(panels[i], name, values, 0.0, total)
    figure.suptitle(
        "f_norm: the same scores through each normalizer (range of the colors in brackets)",
        fontsize=11,
    )


def draw_values(axes, name: str, values: torch.Tensor, low: float, total: str = "") -> None:
    high = values.max().item()
    axes.imshow(values, cmap="inferno", vmin=low, vmax=high)
    axes.set_title(f"{name}  [{low:.2g}, {high:.2g}]{total}", fontsize=8)
    axes.set_axis_off()


def find_tokens_read(name: str) -> torch.Tensor:
    """Return which of the 8 x 8 tokens the output of the query depends on, by its gradient."""
    torch.manual_seed(0)
    options = OPTIONS.get(name, {})
    relation = RELATIONS[name](16, 2, **options).eval()
    x = torch.randn(1, GRID * GRID, 16, requires_grad=True)
    query = QUERY[0] * GRID + QUERY[1]
    if name == "cross":
        y = relation(torch.randn(1, 1, 16), x)[:, 0]
    elif name == "pool":
        y = relation(x)[:, 0]
    elif name == "class":
        class_token = torch.randn(1, 1, 16)
        y = relation(torch.cat([class_token, x], 1))[:, 0]
    else:
        y = relation(x, grid=(GRID, GRID))[:, query]
    (gradient,) = torch.autograd.grad(y.square().sum(), x)
    return (gradient[0].abs().amax(-1) > 0).view(GRID, GRID)


def draw_relations(figure) -> None:
    edges = [i - 0.5 for i in range(GRID + 1)]
    for axes, name in zip(figure.subplots(2, 6).flat, RELATIONS, strict=True):
        is_read = find_tokens_read(name).float()
        axes.imshow(is_read, cmap="cividis", vmin=-0.4, vmax=1)
        y, x = QUERY
        if name in ("cross", "class", "pool"):
            # the query is no token of the grid: beside it
            y, x = (3, -1.4)
        axes.scatter(x, y, marker="s", s=34, zorder=3, color="#d62728")
        axes.set_xlim(-2.0, GRID - 0.5)
        axes.set_xticks(edges, minor=True)
        axes.set_yticks(edges, minor=True)
        axes.grid(which="minor", color="white", linewidth=0.6)
        axes.tick_params(which="both", length=0, labelbottom=False, labelleft=False)
        axes.set_frame_on(False)
        axes.set_title(CAPTIONS[name], fontsize=8)
    title = "Relations: the tokens (yellow) that the output of the red query depends on"
    figure.suptitle(title, fontsize=11)


def main() -> None:
    figure = Figure(figsize=(11, 11), dpi=110, facecolor="white", layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=[6.6, 4.4], hspace=0.04)
    draw_normalizers(top)
    draw_relations(bottom)
    figure.savefig(Path(__file__).with_name("formula.png"))


if __name__ == "__main__":
    main()
