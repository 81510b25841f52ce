"""AttentionOverlays: watch attention form while a network learns."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor, nn

from visattn.draw.overlay import overlay
from visattn.draw.scale import scale_of
from visattn.map import Map
from visattn.methods.chain import EmptyMap
from visattn.methods.explain import explain
from visattn.methods.rollout import rollout
from visattn.record.session import Maps, capture
from visattn.training.reports.head_statistics import (
    add_rows,
    draw_heads,
    head_statistics,
    read_rows,
)


class BatchExplanation(NamedTuple):
    """What was seen of a batch: scores (B, C), where the network looked, and how widely each head attended."""

    scores: Tensor
    heat: Map
    heads: list[dict]


def look(model: nn.Module, images: Tensor) -> BatchExplanation:
    """Look at a batch by rollout of a network's tokens, else its last gate, else Grad-CAM, even if that is zero."""
    with torch.inference_mode(False):
        images = images.clone()
        with torch.no_grad(), capture(model) as maps:
            scores = model(images)
        kinds = _kinds(maps)
        try:
            heat = _heat(model, images, maps, kinds)
        except EmptyMap as empty:  # a finding, and no reason to end a training
            heat = empty.heat
        return BatchExplanation(scores, heat, head_statistics(maps) if "token" in kinds else [])


def _heat(model: nn.Module, images: Tensor, maps: Maps, kinds: list[str]) -> Map:
    if "token" in kinds:
        return rollout(maps)
    if "spatial" in kinds:
        return maps.map(layer=len(kinds) - 1 - kinds[::-1].index("spatial"))
    with torch.enable_grad():
        return explain(model, images, method="gradcam")


def _kinds(maps: Maps) -> list[str]:
    try:
        layers = maps.layers
    except ValueError:  # a network without attention
        return []
    # where tokens have no place in the picture, as the slots of a memory, nothing can be rolled out
    placed = all(layer.grid for layer in layers if layer.kind == "token")
    return [layer.kind if placed or layer.kind != "token" else "memory" for layer in layers]


class AttentionOverlays(Callback):
    """After each validation draw where the network looks in the same few validation images.

    Entropy and mean distance of every head go to heads.csv and heads.png, and their means over
    layers to TensorBoard.

    Args:
        folder: Where the pictures go, one per validation.
        count: Number of images; they are taken evenly from the whole validation set.
    """

    def __init__(self, folder: Path, count: int = 6):
        self.folder = folder
        self.count = count
        self.images: list[Tensor] = []
        self.labels: list[Tensor] = []
        self.seen: list[tuple[Tensor, Tensor]] = []

    def on_validation_batch_end(
        self, trainer, pl_module, outputs, batch, batch_idx: int, dataloader_idx: int = 0
    ):
        if self.images or trainer.sanity_checking or not trainer.is_global_zero:
            return
        batches = int(trainer.num_val_batches[0])
        share = -(-self.count // batches)
        if (
            len(self.seen) < self.count
            and batch_idx * self.count >= len(self.seen) // share * batches
        ):
            self.seen += [
                (image.cpu(), label.cpu())
                for image, label in zip(batch[0][:share], batch[1], strict=False)
            ]

    @rank_zero_only
    def on_validation_end(self, trainer, pl_module) -> None:
        if trainer.sanity_checking or not (self.seen or self.images):
            return
        if not self.images:
            self.images, self.labels = (
                list(part) for part in zip(*self.seen[: self.count], strict=True)
            )
        images = torch.stack(self.images).to(pl_module.device)
        modes = {name: module.training for name, module in pl_module.named_modules()}
        seen = look(
            pl_module.model.eval(), images.contiguous(memory_format=pl_module.memory_format)
        )
        for name, module in pl_module.named_modules():
            module.training = modes[name]  # not train(): frozen layers stay as they are
        pictures = photographs(images.cpu(), trainer.datamodule.transform_config())
        probabilities = pl_module.recipe.probabilities(seen.scores.float()).cpu()
        figure = self._draw(pictures, seen.heat, probabilities, trainer.datamodule.classes)
        self._save(figure, pictures[0], trainer)
        if seen.heads:
            self._note(seen.heads, trainer)

    @rank_zero_only
    def on_fit_end(self, trainer, pl_module) -> None:
        if rows := read_rows(self.folder / "heads.csv"):
            draw_heads(rows, self.folder / "heads.png")

    def _draw(
        self, pictures: list[np.ndarray], heat: Map, probabilities: Tensor, classes: list[str]
    ) -> Figure:
        width = 1.7 * len(pictures) + 0.6
        figure = Figure(
            figsize=(width, 3.9)
        )  # places by hand: searching for a layout costs as much as drawing
        FigureCanvasAgg(figure)
        edges = {
            "left": 0.05 / width,
            "right": 1 - 0.65 / width,
            "bottom": 0.01,
            "top": 0.94,
            "wspace": 0.05,
        }
        axes = figure.subplots(2, len(pictures), squeeze=False, gridspec_kw=edges)
        for column, picture in enumerate(pictures):
            winner = int(probabilities[column].argmax())
            axes[0, column].imshow(picture)
            axes[0, column].set_title(named(self.labels[column], classes), fontsize=8)
            axes[1, column].imshow(overlay(picture, heat[column]))
            axes[1, column].set_title(
                f"{classes[winner]} {probabilities[column, winner]:.2f}", fontsize=8
            )
        scale = scale_of([heat])  # the one that all the overlays share
        colors = ScalarMappable(Normalize(scale.low, scale.high), scale.colormap)
        bar = figure.add_axes((1 - 0.55 / width, 0.06, 0.08 / width, 0.83))
        figure.colorbar(colors, cax=bar).ax.tick_params(labelsize=7)
        for axis in axes.flat:
            axis.set_axis_off()
        return figure

    def _note(self, heads: list[dict], trainer) -> None:
        add_rows(self.folder / "heads.csv", trainer.global_step, heads)
        for quantity in ("entropy", "distance"):
            values = [row[quantity] for row in heads if row[quantity] is not None]
            for logger in trainer.loggers:
                if values and isinstance(logger, TensorBoardLogger):
                    logger.log_metrics(
                        {f"attention_{quantity}": sum(values) / len(values)}, trainer.global_step
                    )

    def _save(self, figure: Figure, sample: np.ndarray, trainer) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        figure.savefig(self.folder / f"step_{trainer.global_step:07d}.png", dpi=100)
        Image.fromarray(sample).save(self.folder / "sample.png")
        pixels = np.asarray(figure.canvas.buffer_rgba())[..., :3]
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_image(
                    "attention", pixels, trainer.global_step, dataformats="HWC"
                )


def named(label: Tensor, classes: list[str]) -> str:
    """Return the class of a label, or the classes of one that has several."""
    numbers = label.nonzero().flatten().tolist() if label.ndim else [int(label)]
    return ", ".join(classes[number] for number in numbers) or "none"


def photographs(images: Tensor, transform: dict) -> list[np.ndarray]:
    """Undo the normalization; enlarge small images so that a map drawn over them can be seen."""
    mean, std = (torch.tensor(transform[key])[:, None, None] for key in ("mean", "std"))
    pixels = (images.float() * std + mean).clamp(0, 1)
    factor = max(1, round(224 / max(images.shape[-2:])))
    pixels = F.interpolate(pixels, scale_factor=factor, mode="nearest") if factor > 1 else pixels
    return list((pixels * 255).round().byte().permute(0, 2, 3, 1).numpy())
