"""load_classifier(): from a run's folder to an object that classifies photographs."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelHubMixin, hf_hub_download
from PIL import Image
from torch import Tensor, nn

from visattn.data.transform import EvalTransform, build_transform
from visattn.training.checkpoint_io import FORMAT, KEY, find_checkpoint, read_checkpoint
from visattn.training.model_file import (
    FOREIGN_FORMATS,
    MODEL_FILE,
    load_weights_of,
    read_model,
    write_model,
)
from visattn.training.network import build_network


class Classifier(ModelHubMixin, library_name="visattn", pipeline_tag="image-classification"):
    """Say which class an image belongs to.

    ``save_pretrained(folder)`` writes the network with all that is needed to use it,
    ``from_pretrained(folder)`` and ``visattn.load_classifier(folder)`` read it again. Given a name
    of Hugging Face's hub, ``from_pretrained`` downloads it.

    Args:
        model: The network, from images (B, 3, h, w) to class scores (B, C); put into evaluation
            mode.
        transform: What turns a PIL image into the tensor (3, h, w) the network was trained on.
        classes: The C names.
        network: The arguments of ``build_network`` that rebuild the model; needed to save it.
        multilabel: An image may belong to several classes, each judged on its own.

    Shape:
        - Input: one PIL image of any size and mode, or a list or tuple of B.
        - Output: probabilities (C,), or (B, C), float32 on the CPU; they sum to one unless
          ``multilabel``.

    Raises:
        TypeError: an image is no PIL image, or there is none.
        ValueError: a model is to be saved without ``network``.

    Example:
        >>> network = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 2))
        >>> config = {"image_size": [8, 8], "resize": "cover", "mean": [0.5] * 3, "std": [0.25] * 3}
        >>> classifier = Classifier(network, build_transform(config), ["cat", "dog"])
        >>> classifier(Image.new("L", (20, 10))).shape
        torch.Size([2])
        >>> classifier
        Classifier(Sequential, 8 x 8 pixels, 2 classes: cat, dog)
    """

    def __init__(
        self,
        model: nn.Module,
        transform: EvalTransform,
        classes: Sequence[str],
        *,
        network: dict[str, Any] | None = None,
        multilabel: bool = False,
    ):
        self.model = model.eval()
        self.transform = transform
        self.classes = list(classes)
        self.network = network
        self.multilabel = multilabel

    def __repr__(self) -> str:
        name = type(self.model).__name__
        if self.network is not None:
            name = self.network["name"]
        facts = [name]
        image_size = getattr(self.transform, "image_size", None)
        if image_size is not None:
            height, width = image_size
            facts.append(f"{height} x {width} pixels")
        shown_classes = ", ".join(self.classes[:5])
        if len(self.classes) > 5:
            shown_classes += ", ..."
        facts.append(f"{len(self.classes)} classes: {shown_classes}")
        if self.multilabel:
            facts.append("multilabel")
        return f"Classifier({', '.join(facts)})"

    @torch.inference_mode()
    def __call__(self, images: Image.Image | list[Image.Image] | tuple[Image.Image, ...]) -> Tensor:
        if isinstance(images, list | tuple):
            return self._classify(images)
        return self._classify([images])[0]

    def _classify(self, images: Sequence[Image.Image]) -> Tensor:
        wrong_types = [
            type(image).__name__ for image in images if not isinstance(image, Image.Image)
        ]
        if wrong_types or not images:
            got = wrong_types[0] if wrong_types else "none"
            raise TypeError(f"images must be a PIL image or a list of them, got {got}")
        batch = torch.stack([self.transform(image) for image in images])  # (B, 3, h, w)
        parameter = next(self.model.parameters(), batch)
        scores = self.model(batch.to(parameter.device, parameter.dtype))
        return self.probabilities(scores).cpu()

    def probabilities(self, scores: Tensor) -> Tensor:
        """Turn scores (B, C) into probabilities: of each class on its own for multilabel images."""
        if self.multilabel:
            return scores.float().sigmoid()
        return scores.float().softmax(1)

    def note(self) -> dict[str, Any]:
        """Return all that is needed beside the weights, in plain words, as checkpoints hold it."""
        if self.network is None:
            raise ValueError(
                "only a classifier that visattn.load_classifier returned can be saved: "
                "it knows its network"
            )
        return {
            "format": FORMAT,
            "network": self.network,
            "classes": self.classes,
            "transform": self.transform.config(),
            "several": self.multilabel,  # the key is part of the format
        }

    def _save_pretrained(self, save_directory: Path) -> None:
        note = self.note()
        (save_directory / "config.json").write_text(json.dumps({KEY: note}, indent=2))
        write_model(save_directory / MODEL_FILE, self.model, note)

    @classmethod
    def _from_pretrained(
        cls,
        *,
        model_id: str,
        revision: str | None,
        cache_dir: str | Path | None,
        force_download: bool,
        local_files_only: bool,
        token: str | bool | None,
        **model_kwargs: Any,  # huggingface_hub passes the settings of config.json here
    ) -> "Classifier":
        if Path(model_id).is_dir():
            return load_classifier(model_id)
        path = hf_hub_download(
            model_id,
            MODEL_FILE,
            revision=revision,
            cache_dir=cache_dir,
            force_download=force_download,
            local_files_only=local_files_only,
            token=token,
        )
        return load_classifier(path)


def load_classifier(run: str | Path) -> Classifier:
    """Return a trained classifier, on the CPU.

    Args:
        run: A run's folder (its best checkpoint is read), a checkpoint, a safetensors file that
            ``visattn export`` wrote, or a folder of ``save_pretrained``.
    """
    path = Path(run)
    if path.suffix in FOREIGN_FORMATS:
        raise ValueError(
            f"{path} is a graph, not a network: open it with {FOREIGN_FORMATS[path.suffix]}"
        )
    if path.is_dir():
        path = _file_of_folder(path)
    if path.suffix == ".safetensors" and path.is_file():
        model, note = read_model(path)
    else:
        model, note = _read_checkpoint_model(path)
    return Classifier(
        model,
        build_transform(note["transform"]),
        note["classes"],
        network=note["network"],
        multilabel=note.get("several", False),  # older checkpoints do not say
    )


def _file_of_folder(folder: Path) -> Path:
    """Return the best checkpoint of a run, or the file of a folder of ``save_pretrained``."""
    model_file = folder / MODEL_FILE
    if model_file.is_file() and not (folder / "checkpoints").is_dir():
        return model_file
    return find_checkpoint(folder)


def _read_checkpoint_model(path: Path) -> tuple[nn.Module, dict[str, Any]]:
    content = read_checkpoint(path)
    note = content[KEY]
    model = build_network(**note["network"])
    weights = {}
    for key, value in content["state_dict"].items():
        if key.startswith("model."):
            weights[key.removeprefix("model.")] = value
    load_weights_of(path, note, lambda: model.load_state_dict(weights))
    return model, note
