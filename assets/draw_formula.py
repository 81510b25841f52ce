"""Draw assets/formula.png: one row of scores through every normalizer, and every relation as the tokens it reads.

Run from the project's folder: uv run assets/draw_formula.py
"""

from pathlib import Path

import torch
from matplotlib.figure import Figure

from visattn.core.attention import RELATIONS
from visattn.core.normalize import NORMALIZERS

GRID = 8
LOCAL = {
    "window": {"window_size": 4},
    "shifted_window": {"window_size": 4},
    "grid": {"window_size": 4},
}
LOCAL |= {"neighborhood": {"kernel_size": 3}, "memory": {"normalize": NORMALIZERS["softmax"]()}}
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


def scores() -> torch.Tensor:
    """Return scores of one query over a 14 x 14 grid: two bumps and a little noise."""
    y, x = torch.meshgrid(torch.arange(14.0), torch.arange(14.0), indexing="ij")
    bumps = 5 * torch.exp(-((y - 4) ** 2 + (x - 5) ** 2) / 6) + 3.5 * torch.exp(
        -((y - 10) ** 2 + (x - 10) ** 2) / 3
    )
    return bumps - 1 + 0.3 * torch.randn(14, 14, generator=torch.Generator().manual_seed(0))


def draw_normalizers(figure) -> None:
    e = scores()
    panels = {"scores e": e}
    for name, normalizer in NORMALIZERS.items():
        # double and sinkhorn look at all queries: the others here ask about the upper left bump and
        # its surroundings
        shifts = (
            (3 * torch.randn(195, 2, generator=torch.Generator().manual_seed(1))).int().tolist()
        )
        others = torch.stack(
            [
                (e * (torch.arange(14) < 10)[:, None]).roll(shift, (0, 1)).flatten()
                for shift in shifts
            ]
        )
        alpha = normalizer().eval()(torch.cat([e.view(1, -1), others])[None, None])
        panels[name] = alpha[0, 0, 0].view(14, 14).detach()
    for axes, (name, values) in zip(figure.subplots(3, 5).flat, panels.items(), strict=True):
        low, high = (
            (values.min().item(), values.max().item())
            if name == "scores e"
            else (0.0, values.max().item())
        )
        axes.imshow(values, cmap="inferno", vmin=low, vmax=high)
        zeros = (values == 0).float().mean().item()
        total = "" if name == "scores e" else f"\nsum {values.sum().item():.2f}, {zeros:.0%} zero"
        axes.set_title(f"{name}  [{low:.2g}, {high:.2g}]{total}", fontsize=8)
        axes.set_axis_off()
    figure.suptitle(
        "f_norm: the same scores through each normalizer (range of the colors in brackets)",
        fontsize=11,
    )


def reads(name: str) -> torch.Tensor:
    """Return which of the 8 x 8 tokens the output of the marked one depends on, found by its gradient."""
    torch.manual_seed(0)
    relation = RELATIONS[name](16, 2, **LOCAL.get(name, {})).eval()
    x = torch.randn(1, GRID * GRID, 16, requires_grad=True)
    place = QUERY[0] * GRID + QUERY[1]
    if name == "cross":
        y = relation(torch.randn(1, 1, 16), x)[:, 0]
    elif name == "pool":
        y = relation(x)[:, 0]
    elif name == "class":
        y = relation(torch.cat([torch.randn(1, 1, 16), x], 1))[:, 0]
    else:
        y = relation(x, grid=(GRID, GRID))[:, place]
    (gradient,) = torch.autograd.grad(y.square().sum(), x)
    return (gradient[0].abs().amax(-1) > 0).view(GRID, GRID)


def draw_relations(figure) -> None:
    for axes, name in zip(figure.subplots(2, 6).flat, RELATIONS, strict=True):
        read = reads(name).float()
        inside = name not in ("cross", "class", "pool")
        axes.imshow(read, cmap="cividis", vmin=-0.4, vmax=1)
        axes.scatter(
            QUERY[1] if inside else -1.4,
            QUERY[0] if inside else 3,
            marker="s",
            s=34,
            zorder=3,
            color="#d62728",
        )
        axes.set_xlim(-2.0, GRID - 0.5)
        axes.set_xticks([i - 0.5 for i in range(GRID + 1)], minor=True)
        axes.set_yticks([i - 0.5 for i in range(GRID + 1)], minor=True)
        axes.grid(which="minor", color="white", linewidth=0.6)
        axes.tick_params(which="both", length=0, labelbottom=False, labelleft=False)
        axes.set_frame_on(False)
        axes.set_title(CAPTIONS[name], fontsize=8)
    title = "Relations: the tokens (yellow) that the output of the red query reads, found by its gradient"
    figure.suptitle(title, fontsize=11)


def main() -> None:
    figure = Figure(figsize=(11, 11), dpi=110, facecolor="white", layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=[6.6, 4.4], hspace=0.04)
    draw_normalizers(top)
    draw_relations(bottom)
    figure.savefig(Path(__file__).with_name("formula.png"))


if __name__ == "__main__":
    main()
