"""Shared by the tests of training: a folder of drawn shapes, a run of seconds, comparisons."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from visattn.training import cli
from visattn.training.checkpoint_io import read_checkpoint

SHAPES = {"bar": "rectangle", "disc": "ellipse", "line": "line"}
SMALL = {"dim": 16, "depth": 2, "num_heads": 2}
TINY = {"name": "vit_nano", "num_classes": 3, "image_size": 16, "options": SMALL}


def draw_folder(root: Path, train: int = 13, val: int = 7) -> Path:
    """Three classes of drawn shapes, as class folders under train/ and val/."""
    generator = np.random.default_rng(0)
    for split, count in (("train", train), ("val", val)):
        for name, shape in SHAPES.items():
            folder = root / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                image = Image.new("RGB", (19, 17), "white")
                x, y = generator.integers(0, 8, 2).tolist()
                getattr(ImageDraw.Draw(image), shape)((x, y, x + 8, y + 7), fill="black")
                image.save(folder / f"{number:02}.png")
    return root


def keys(root: Path, out: Path, **changed) -> list[str]:
    """The flat keys of a run of seconds, as a command line; two underscores stand for a dot."""
    chosen = {
        "out": out,
        "overlays": 0,
        "model.name": "vit_nano",
        "model.image_size": 16,
        "model.options": '{"dim": 16, "depth": 2, "num_heads": 2, "drop_path": 0.2}',
        "model.mixup": 0.2,
        "data.root": root,
        "data.batch_size": 5,
        "data.num_workers": 0,
        "trainer.max_epochs": 2,
        "trainer.accelerator": "cpu",
        "trainer.devices": 1,
        "trainer.enable_progress_bar": "false",
    }
    chosen |= {key.replace("__", "."): value for key, value in changed.items()}
    return [
        part
        for key, value in chosen.items()
        if value is not None
        for part in (f"--{key}", str(value))
    ]


def weights(path: Path) -> dict:
    return read_checkpoint(path)["state_dict"]


def same(first: dict, second: dict) -> bool:
    return first.keys() == second.keys() and all(
        torch.equal(first[key], second[key]) for key in first
    )


def refusal(arguments: list[str], capsys, code: int = 2) -> str:
    """Run a command that must fail; return the one line it says."""
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    said = capsys.readouterr().err.strip()
    assert stop.value.code == code
    assert len(said.splitlines()) == 1, said
    return said
