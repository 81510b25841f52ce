"""load_classifier(): from a run's folder to something that takes a photograph and answers."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from huggingface_hub import ModelHubMixin, hf_hub_download
from PIL import Image
from torch import Tensor, nn

from visattn.data.transform import build_transform
from visattn.training.checkpoint_io import FORMAT, KEY, find_checkpoint, read_checkpoint
from visattn.training.model_file import FILE, FOREIGN, read_model, write_model
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
        several: An image may belong to several classes, each judged on its own.

    Shape:
        - Input: one PIL image of any size and mode, or a list or tuple of B.
        - Output: probabilities (C,), or (B, C), float32 on the CPU; they sum to one unless
          ``several``.

    Raises:
        TypeError: an image is no PIL image, or there is none.
        ValueError: a model is to be saved and ``network`` was not given.

    Example:
        >>> network = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 2))
        >>> transform = build_transform({"image_size": [8, 8], "resize": "cover", "mean": [0.5] * 3, "std": [0.25] * 3})
        >>> Classifier(network, transform, ["cat", "dog"])(Image.new("L", (20, 10))).shape
        torch.Size([2])
    """

    def __init__(
        self,
        model: nn.Module,
        transform: Callable[[Image.Image], Tensor],
        classes: Sequence[str],
        *,
        network: dict | None = None,
        several: bool = False,
    ):
        self.model = model.eval()
        self.transform = transform
        self.classes = list(classes)
        self.network = network
        self.several = several

    @torch.inference_mode()
    def __call__(self, images: Image.Image | list[Image.Image] | tuple[Image.Image, ...]) -> Tensor:
        several = isinstance(images, list | tuple)
        given = images if several else [images]
        strange = [type(image).__name__ for image in given if not isinstance(image, Image.Image)]
        if strange or not given:
            raise TypeError(
                f"images must be a PIL image or a list of them, got {strange[0] if strange else 'none'}"
            )
        batch = torch.stack([self.transform(image) for image in given])
        first = next(self.model.parameters(), batch)
        probabilities = self.probabilities(self.model(batch.to(first.device, first.dtype))).cpu()
        return probabilities if several else probabilities[0]

    def probabilities(self, scores: Tensor) -> Tensor:
        """Turn scores (B, C) into probabilities: of each class on its own where an image may have several."""
        return scores.float().sigmoid() if self.several else scores.float().softmax(1)

    def note(self) -> dict:
        """All that is needed beside the weights, in plain words, as it stands in checkpoints."""
        if self.network is None:
            raise ValueError(
                "only a classifier that visattn.load_classifier returned can be saved: it knows its network"
            )
        names = {"format": FORMAT, "network": self.network, "classes": self.classes}
        return names | {"transform": self.transform.config(), "several": self.several}

    def _save_pretrained(self, save_directory: Path) -> None:
        note = self.note()
        (save_directory / "config.json").write_text(json.dumps({KEY: note}, indent=2))
        write_model(save_directory / FILE, self.model, note)

    @classmethod
    def _from_pretrained(
        cls,
        *,
        model_id: str,
        revision,
        cache_dir,
        force_download: bool,
        local_files_only: bool,
        token,
    ) -> "Classifier":
        if Path(model_id).is_dir():
            return load_classifier(model_id)
        fetched = hf_hub_download(
            model_id,
            FILE,
            revision=revision,
            cache_dir=cache_dir,
            force_download=force_download,
            local_files_only=local_files_only,
            token=token,
        )
        return load_classifier(fetched)


def load_classifier(run: str | Path) -> Classifier:
    """Return the classifier, on the CPU, of a run's folder (its best checkpoint), of a checkpoint, of a safetensors
    file that ``visattn export`` wrote or of a folder of ``save_pretrained``."""
    run = Path(run)
    if run.suffix in FOREIGN:
        raise ValueError(f"{run} is a graph, not a network: open it with {FOREIGN[run.suffix]}")
    if run.is_dir() and not (run / "checkpoints").is_dir() and (run / FILE).is_file():
        run = run / FILE
    if run.suffix == ".safetensors" and run.is_file():
        model, note = read_model(run)
    else:
        model, note = _of_checkpoint(find_checkpoint(run) if run.is_dir() else run)
    told = {
        "network": note["network"],
        "several": note.get("several", False),
    }  # which older checkpoints do not tell
    return Classifier(model, build_transform(note["transform"]), note["classes"], **told)


def _of_checkpoint(path: Path) -> tuple[nn.Module, dict]:
    content = read_checkpoint(path)
    note = content[KEY]
    model = build_network(**note["network"])
    weights = {
        key[6:]: value for key, value in content["state_dict"].items() if key.startswith("model.")
    }
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(
            f"the weights in {path} do not fit the model {note['network']['name']!r}: {error}"
        ) from error
    return model, note
