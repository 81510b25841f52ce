"""A run as training leaves it: a checkpoint that says how to rebuild its model."""

from pathlib import Path

import torch

from visattn.models.presets import create_model


def untrained_run(folder: Path, classes: list[str]) -> Path:
    """Write the run of a small network that nobody trained, and return its folder."""
    torch.manual_seed(0)
    network = {"name": "vit_nano", "num_classes": len(classes), "image_size": 24}
    weights = {f"model.{key}": value for key, value in create_model(**network).state_dict().items()}
    transform = {"image_size": [24, 24], "resize": "cover", "mean": [0.5] * 3, "std": [0.25] * 3}
    note = {"format": 1, "network": network, "classes": classes, "transform": transform}
    (folder / "checkpoints").mkdir(parents=True)
    torch.save({"visattn": note, "state_dict": weights}, folder / "checkpoints" / "best.ckpt")
    return folder
