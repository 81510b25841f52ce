"""Draw assets/blocks.png: the maps of six blocks in a small CNN for one photograph.

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
from matplotlib.axes import Axes
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
# where a block is inserted, behind a residual unit, from the finest maps to the coarsest
SITES = {
    "layer1.0": "simam",
    "layer1.1": "cbam",
    "layer2.0": "coord",
    "layer2.1": "bam",
    "layer3.0": "gc",
    "layer3.1": "non_local",
}
HEIGHT = 128  # pixels of the photograph as the network sees it
QUERY = (0.38, 0.38)  # the marked position, in shares of height and width
EPOCHS = 3
TRAINING_SIZE = 24  # pixels: small images are cheap
BATCH_SIZE = 128


def network(num_classes: int) -> nn.Module:
    torch.manual_seed(0)
    model = visattn.create_model("resnet14", num_classes=num_classes)
    for site, block in SITES.items():
        visattn.insert(model, block, where=site, identity=False, example=(1, 3, 32, 32))
    return model.to(memory_format=torch.channels_last)


def normalize(images: Tensor) -> Tensor:
    return (images.float() / 255 - 0.47) / 0.25


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Mirror half of the images, and shift the batch by up to four pixels."""
    is_mirrored = torch.rand(len(images), generator=generator) < 0.5
    down, right = torch.randint(9, (2,), generator=generator).tolist()
    images = torch.where(is_mirrored[:, None, None, None], images.flip(3), images)
    height, width = images.shape[2:]
    padded = F.pad(images, (4,) * 4)
    return padded[:, :, down : down + height, right : right + width]


def read_images(source) -> Tensor:
    images = []
    for i in range(len(source)):
        image = pil_to_tensor(source.image(i))
        images.append(resize(image, [TRAINING_SIZE, TRAINING_SIZE]))
    return torch.stack(images)


def train(root: str, out: str) -> None:
    source = list_classes(root)["train"]
    images = read_images(source)
    labels = torch.as_tensor(np.array(source.labels))
    splits = split_stratified(np.array(source.labels), 0.1, 0)
    training, validation = [torch.as_tensor(numbers) for numbers in splits]
    model = network(len(source.classes))
    generator = torch.Generator().manual_seed(0)
    start_seconds = time.process_time()
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.05)
    batches = len(training) // BATCH_SIZE
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.01, total_steps=EPOCHS * batches)
    for epoch in range(1, EPOCHS + 1):
        order = training[torch.randperm(len(training), generator=generator)]
        for batch in order[: batches * BATCH_SIZE].split(BATCH_SIZE):
            augmented = augment(normalize(images[batch]), generator)
            loss = F.cross_entropy(model(augmented), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        minutes = (time.process_time() - start_seconds) / 60
        accuracy = measure_accuracy(model, images[validation], labels[validation])
        print(
            f"epoch {epoch}: loss {loss.item():.3f}, validation accuracy {accuracy:.1%}, "
            f"{minutes:.1f} CPU minutes"
        )
    about = {
        "data": Path(root).parent.name,
        "classes": source.classes,
        "images": len(training),
        "validation": len(validation),
        "epochs": EPOCHS,
        "minutes": minutes,
        "accuracy": accuracy,
    }
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    torch.save({"weights": model.state_dict(), "about": about}, out)


@torch.no_grad()
def measure_accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    model.eval()
    predictions = [model(normalize(batch)).argmax(1) for batch in images.split(500)]
    model.train()
    return (torch.cat(predictions) == labels).float().mean().item()


def read_maps(model: nn.Module, image: Tensor) -> dict[str, tuple[str, Tensor]]:
    """Return for each block what is shown of it, and the map (h, w)."""
    with torch.no_grad(), visattn.capture(model) as maps:
        model(image)
    gates: dict[str, list[Tensor]] = {}
    for site, block in SITES.items():
        records = [record for record in maps.layers if record.name.startswith(f"{site}.")]
        gates[block] = [record.alpha[0] for record in records if record.alpha is not None]
        if block == "non_local":
            attention = records[0]
    row_gate, column_gate = gates["coord"]
    rows, columns = attention.grid
    query = int(QUERY[0] * rows) * columns + int(QUERY[1] * columns)
    attended = attention.row(query)[0, 0].unflatten(0, attention.grid)
    return {
        "simam": ("gate, mean over channels", gates["simam"][0].mean(0)),
        "cbam": ("spatial gate", gates["cbam"][1][0]),
        "coord": ("row gate x column gate, mean over channels", (row_gate * column_gate).mean(0)),
        "bam": ("gate, mean over channels", gates["bam"][0].mean(0)),
        "gc": ("softmax over all positions", gates["gc"][0][0]),
        "non_local": ("what the marked position attends", attended),
    }


def draw(path: str) -> None:
    content = torch.load(path, weights_only=True)
    about = content["about"]
    model = network(len(about["classes"]))
    model.load_state_dict(content["weights"])
    photo = Image.open(ASSETS / "photos" / "chelsea.jpg").convert("RGB")
    small = resize(photo, [HEIGHT, round(HEIGHT * photo.width / photo.height)])
    maps = read_maps(model.eval(), normalize(pil_to_tensor(small)[None]))
    figure = Figure(figsize=(13, 5.6), dpi=110, facecolor="white", layout="constrained")
    blocks = list(maps)
    layout = [["photo", *blocks[:3]], ["photo", *blocks[3:]]]
    axes = figure.subplot_mosaic(layout, width_ratios=[1.25, 1, 1, 1])
    axes["photo"].imshow(photo)
    axes["photo"].set_title(f"{small.width} x {small.height} pixels for the network", fontsize=9)
    for site, block in SITES.items():
        caption, values = maps[block]
        rows, columns = values.shape
        draw_map(figure, axes[block], photo, values)
        title = f"{block}, behind {site}, {columns} x {rows}\n{caption}"
        axes[block].set_title(title, fontsize=9)
    x = QUERY[1] * photo.width
    y = QUERY[0] * photo.height
    axes["non_local"].plot(x, y, "s", mfc="none", mec="cyan", mew=1.6)
    for panel in axes.values():
        panel.set_axis_off()
    title = (
        f"Six blocks in one ResNet-14, trained on {about['images']:,} photographs "
        f"({about['data']}) for {about['epochs']} epochs, {about['minutes']:.0f} minutes of one "
        f"CPU core: accuracy {about['accuracy']:.0%} on {about['validation']:,} validation images"
    )
    figure.suptitle(title, fontsize=10)
    figure.savefig(ASSETS / "blocks.png")


def draw_map(figure: Figure, panel: Axes, photo: Image.Image, values: Tensor) -> None:
    panel.imshow(visattn.overlay(photo, values, alpha=0.65))
    limits = Normalize(values.min().item(), values.max().item())
    colors = ScalarMappable(limits, "inferno")
    bar = figure.colorbar(colors, ax=panel, fraction=0.035, pad=0.02)
    bar.ax.tick_params(labelsize=7)


if __name__ == "__main__":
    command, *arguments = sys.argv[1:]
    if command == "train":
        train(*arguments)
    else:
        draw(*arguments)
