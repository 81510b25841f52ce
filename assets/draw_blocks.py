"""Draw assets/blocks.png: one photograph through a small CNN with six blocks, and what each block weighs in it.

Train the CNN on a folder or zip of class folders (CIFAR-10, say), once, then draw, from the
project's folder:
    uv run assets/draw_blocks.py train my_images.zip runs/blocks.pt
    uv run assets/draw_blocks.py draw runs/blocks.pt
"""

import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms.functional import pil_to_tensor, resize

import visattn
from visattn.data.images import list_classes
from visattn.data.labels import split_stratified

ASSETS = Path(__file__).parent
# One block behind each residual unit, from the finest maps to the coarsest.
PLACES = {
    "layer1.0": "simam",
    "layer1.1": "cbam",
    "layer2.0": "coord",
    "layer2.1": "bam",
    "layer3.0": "gc",
    "layer3.1": "non_local",
}
HEIGHT, QUERY = (
    128,
    (0.38, 0.38),
)  # of the photograph: rows the network is given, and the marked position
EPOCHS, SIZE, BATCH = 3, 24, 128  # small images are cheap


def network(num_classes: int) -> nn.Module:
    torch.manual_seed(0)
    model = visattn.create_model("resnet14", num_classes=num_classes)
    for place, block in PLACES.items():
        visattn.insert(model, block, where=place, identity=False, example=(1, 3, 32, 32))
    return model.to(memory_format=torch.channels_last)


def normalized(images: Tensor) -> Tensor:
    return (images.float() / 255 - 0.47) / 0.25


def moved(images: Tensor, random: torch.Generator) -> Tensor:
    """Return the batch mirrored or not, and shifted by up to four pixels."""
    flip, (down, right) = (
        torch.rand(len(images), generator=random) < 0.5,
        torch.randint(9, (2,), generator=random),
    )
    images = torch.where(flip[:, None, None, None], images.flip(3), images)
    height, width = images.shape[2:]
    return F.pad(images, (4,) * 4)[:, :, down : down + height, right : right + width]


def train(root: str, out: str) -> None:
    source = list_classes(root)["train"]
    labels = torch.as_tensor(np.array(source.labels))
    images = torch.stack(
        [resize(pil_to_tensor(source.image(i)), [SIZE] * 2) for i in range(len(source))]
    )
    used, held = (
        torch.as_tensor(part) for part in split_stratified(np.array(source.labels), 0.1, 0)
    )
    model, random, start = (
        network(len(source.classes)),
        torch.Generator().manual_seed(0),
        time.process_time(),
    )
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.05)
    steps = EPOCHS * (len(used) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.01, total_steps=steps)
    for epoch in range(1, EPOCHS + 1):
        order = used[torch.randperm(len(used), generator=random)]
        for batch in order[: len(used) // BATCH * BATCH].split(BATCH):
            loss = F.cross_entropy(model(moved(normalized(images[batch]), random)), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        minutes = (time.process_time() - start) / 60
        accuracy = right(model, images[held], labels[held])
        print(
            f"epoch {epoch}: loss {loss.item():.3f}, held out {accuracy:.1%}, {minutes:.1f} CPU minutes"
        )
    about = {
        "data": Path(root).parent.name,
        "classes": source.classes,
        "images": len(used),
        "held": len(held),
    }
    about |= {"epochs": EPOCHS, "minutes": minutes, "accuracy": accuracy}
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    torch.save({"weights": model.state_dict(), "about": about}, out)


@torch.no_grad()
def right(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Return the share of images that the model names rightly."""
    named = torch.cat([model.eval()(normalized(batch)).argmax(1) for batch in images.split(500)])
    model.train()
    return (named == labels).float().mean().item()


def weighed(model: nn.Module, image: Tensor) -> dict[str, tuple[str, Tensor]]:
    """Return for each block what is shown of it, and the map."""
    with torch.no_grad(), visattn.capture(model) as maps:
        model(image)
    records = {
        block: [r for r in maps.layers if r.name.startswith(f"{place}.")]
        for place, block in PLACES.items()
    }
    gates = {
        block: [r.alpha[0] for r in found if r.alpha is not None]
        for block, found in records.items()
    }
    rows, columns = gates["coord"]
    attention = records["non_local"][0]
    y, x = (int(part * size) for part, size in zip(QUERY, attention.grid, strict=True))
    row = attention.row(y * attention.grid[1] + x)[0, 0].unflatten(0, attention.grid)
    return {
        "simam": ("gate, mean over channels", gates["simam"][0].mean(0)),
        "cbam": ("spatial gate", gates["cbam"][1][0]),
        "coord": ("row gate x column gate, mean over channels", (rows * columns).mean(0)),
        "bam": ("gate, mean over channels", gates["bam"][0].mean(0)),
        "gc": ("softmax over all positions", gates["gc"][0][0]),
        "non_local": ("what the marked position attends", row),
    }


def draw(path: str) -> None:
    content = torch.load(path, weights_only=True)
    about = content["about"]
    model = network(len(about["classes"]))
    model.load_state_dict(content["weights"])
    photo = Image.open(ASSETS / "photos" / "chelsea.jpg").convert("RGB")
    small = resize(photo, [HEIGHT, round(HEIGHT * photo.width / photo.height)])
    maps = weighed(model.eval(), normalized(pil_to_tensor(small)[None]))
    figure = Figure(figsize=(13, 5.6), dpi=110, facecolor="white", layout="constrained")
    axes = figure.subplot_mosaic(
        [["photo", *list(maps)[:3]], ["photo", *list(maps)[3:]]], width_ratios=[1.25, 1, 1, 1]
    )
    axes["photo"].imshow(photo)
    axes["photo"].set_title(f"{small.width} x {small.height} pixels for the network", fontsize=9)
    for place, (block, (what, values)) in zip(PLACES, maps.items(), strict=True):
        panel, low, high = axes[block], values.min().item(), values.max().item()
        panel.imshow(visattn.overlay(photo, values, alpha=0.65))
        bar = figure.colorbar(
            ScalarMappable(Normalize(low, high), "inferno"), ax=panel, fraction=0.035, pad=0.02
        )
        bar.ax.tick_params(labelsize=7)
        panel.set_title(
            f"{block}, behind {place}, {values.shape[1]} x {values.shape[0]}\n{what}", fontsize=9
        )
    axes["non_local"].plot(
        QUERY[1] * photo.width, QUERY[0] * photo.height, "s", mfc="none", mec="cyan", mew=1.6
    )
    for panel in axes.values():
        panel.set_axis_off()
    figure.suptitle(
        f"Six blocks in one ResNet-14, trained on {about['images']:,} photographs ({about['data']}) for "
        f"{about['epochs']} epochs, {about['minutes']:.0f} minutes of one CPU core: {about['accuracy']:.0%} right "
        f"of {about['held']:,} held out",
        fontsize=10,
    )
    figure.savefig(ASSETS / "blocks.png")


if __name__ == "__main__":
    {"train": train, "draw": draw}[sys.argv[1]](*sys.argv[2:])
