"""AttentionOverlays: watch attention form while a network learns."""

from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as pl
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
from visattn.tracing import evaluating
from visattn.training.reports.head_statistics import (
    add_rows,
    draw_heads,
    head_statistics,
    read_rows,
)

SHOWN_SIDE = 224  # pixels; smaller images are enlarged to about this


class BatchExplanation(NamedTuple):
    """A batch's scores (B, C), the map of where the network looked, and statistics of its heads."""

    scores: Tensor
    heat: Map
    heads: list[dict[str, Any]]


def explain_batch(model: nn.Module, images: Tensor) -> BatchExplanation:
    """Explain a batch by rollout of its tokens, else the last spatial gate, else Grad-CAM."""
    with torch.inference_mode(False):
        images = images.clone()  # a tensor of inference mode takes no gradients
        with torch.no_grad(), capture(model) as maps:
            scores = model(images)
        layer_kinds = _layer_kinds(maps)
        try:
            heat = _choose_map(model, images, maps, layer_kinds)
        except EmptyMap as empty:  # a map of zeros is a result, and no reason to end a training
            heat = empty.heat
        heads = []
        if "token" in layer_kinds:
            heads = head_statistics(maps)
        return BatchExplanation(scores, heat, heads)


def _choose_map(
    model: nn.Module,
    images: Tensor,
    maps: Maps,
    layer_kinds: list[str],
) -> Map:
    if "token" in layer_kinds:
        return rollout(maps)
    spatial_layers = [number for number, kind in enumerate(layer_kinds) if kind == "spatial"]
    if spatial_layers:
        return maps.map(layer=spatial_layers[-1])
    with torch.enable_grad():
        return explain(model, images, method="gradcam")


def _layer_kinds(maps: Maps) -> list[str]:
    """Return the kind of each layer's map; tokens that cannot be rolled out count as "memory"."""
    try:
        layers = maps.layers
    except ValueError:  # a network without attention
        return []
    kinds = [layer.kind for layer in layers]
    # where tokens have no place in the picture, as the slots of a memory, nothing can be rolled out
    tokens_have_grid = all(layer.grid for layer in layers if layer.kind == "token")
    if tokens_have_grid:
        return kinds
    return ["memory" if kind == "token" else kind for kind in kinds]


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
        self.is_chosen = False  # the images are chosen in the first whole validation

    def on_validation_batch_end(
        self,
        trainer,
        pl_module,
        outputs,
        batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if self.is_chosen or trainer.sanity_checking or not trainer.is_global_zero:
            return
        batches = int(trainer.num_val_batches[0])
        per_batch = -(-self.count // batches)  # rounded up
        chosen_batches = len(self.images) // per_batch
        # take some of this batch once the evenly spaced place of the next choice is reached
        if len(self.images) < self.count and batch_idx * self.count >= chosen_batches * batches:
            images, labels = batch
            self.images += [image.cpu() for image in images[:per_batch]]
            self.labels += [label.cpu() for label in labels[:per_batch]]

    @rank_zero_only
    def on_validation_end(self, trainer, pl_module) -> None:
        if trainer.sanity_checking or not self.images:
            return
        self.is_chosen = True
        del self.images[self.count :]
        del self.labels[self.count :]
        images = torch.stack(self.images).to(pl_module.device)  # (count, 3, h, w)
        explanation = self._explain(pl_module, images)
        pictures = photographs(images.cpu(), trainer.datamodule.transform_config())
        probabilities = pl_module.recipe.probabilities(explanation.scores.float()).cpu()
        figure = self._draw(pictures, explanation.heat, probabilities, trainer.datamodule.classes)
        self._save(figure, pictures[0], trainer)
        if explanation.heads:
            self._save_heads(explanation.heads, trainer)

    @rank_zero_only
    def on_fit_end(self, trainer, pl_module) -> None:
        rows = read_rows(self.folder / "heads.csv")
        if rows:
            draw_heads(rows, self.folder / "heads.png")

    def _explain(self, module, images: Tensor) -> BatchExplanation:
        """Explain the images in evaluation mode, and restore each layer's mode."""
        ordered_images = images.contiguous(memory_format=module.memory_format)
        with evaluating(module.model):
            return explain_batch(module.model, ordered_images)

    def _draw(
        self,
        pictures: list[np.ndarray],
        heat: Map,
        probabilities: Tensor,
        classes: list[str],
    ) -> Figure:
        """Draw the images above their overlays, with true and predicted classes and one scale."""
        width = 1.7 * len(pictures) + 0.6
        # edges are set by hand: a layout engine costs as much as the drawing
        figure = Figure(figsize=(width, 3.9))
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
            truth = class_names(self.labels[column], classes)
            answer = f"{classes[winner]} {probabilities[column, winner]:.2f}"
            axes[0, column].imshow(picture)
            axes[0, column].set_title(truth, fontsize=8)
            axes[1, column].imshow(overlay(picture, heat[column]))
            axes[1, column].set_title(answer, fontsize=8)
        for axis in axes.flat:
            axis.set_axis_off()
        scale = scale_of([heat])  # the one that all the overlays share
        colors = ScalarMappable(Normalize(scale.low, scale.high), scale.colormap)
        bar_axis = figure.add_axes((1 - 0.55 / width, 0.06, 0.08 / width, 0.83))
        figure.colorbar(colors, cax=bar_axis).ax.tick_params(labelsize=7)
        return figure

    def _save(
        self,
        figure: Figure,
        sample: np.ndarray,
        trainer: pl.Trainer,
    ) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        figure.savefig(self.folder / f"step_{trainer.global_step:07d}.png", dpi=100)
        Image.fromarray(sample).save(self.folder / "sample.png")
        canvas = figure.canvas
        assert isinstance(canvas, FigureCanvasAgg)  # _draw made it
        pixels = np.asarray(canvas.buffer_rgba())[..., :3]  # (H, W, 4) -> (H, W, 3)
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_image(
                    "attention", pixels, trainer.global_step, dataformats="HWC"
                )

    def _save_heads(
        self,
        heads: list[dict[str, Any]],
        trainer: pl.Trainer,
    ) -> None:
        add_rows(self.folder / "heads.csv", trainer.global_step, heads)
        means = {}
        for quantity in ("entropy", "distance"):
            values = [row[quantity] for row in heads if row[quantity] is not None]
            if values:
                means[f"attention_{quantity}"] = sum(values) / len(values)
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.log_metrics(means, trainer.global_step)


def class_names(label: Tensor, classes: list[str]) -> str:
    """Return the class of a label (), or the classes of a multilabel one (C,)."""
    if label.ndim == 0:
        return classes[int(label)]
    numbers = label.nonzero().flatten().tolist()
    return ", ".join(classes[number] for number in numbers) or "none"


def photographs(images: Tensor, transform: dict[str, Any]) -> list[np.ndarray]:
    """Undo the normalization of images (B, 3, h, w), and enlarge small ones for the eye."""
    mean = torch.tensor(transform["mean"])[:, None, None]
    std = torch.tensor(transform["std"])[:, None, None]
    pixels = (images.float() * std + mean).clamp(0, 1)
    factor = round(SHOWN_SIDE / max(images.shape[-2:]))
    if factor > 1:
        pixels = F.interpolate(pixels, scale_factor=factor, mode="nearest")
    pixels = (pixels * 255).round().byte()
    return list(pixels.permute(0, 2, 3, 1).numpy())  # (B, 3, H, W) -> B x (H, W, 3)
