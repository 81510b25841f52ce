"""What all tests share: one thread each, since two run side by side, and no network."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def shapes(tmp_path_factory):
    """A folder of drawn shapes in three classes: 39 images to train, 21 to validate."""
    from training_cases import draw_folder

    return draw_folder(tmp_path_factory.mktemp("shapes"))


@pytest.fixture(scope="session")
def run(shapes, tmp_path_factory):
    """A finished run on them: two epochs of seven steps, with a checkpoint every three steps."""
    from training_cases import keys

    from visattn.training import cli

    out = tmp_path_factory.mktemp("runs") / "whole"
    cli.main(["fit", *keys(shapes, out, checkpoint_steps=3, overlays=2)])
    return out


@pytest.fixture
def at_step(monkeypatch):
    """Do something once, when a step of training begins."""
    from visattn.training.module import ImageClassifier

    def do(step: int, act) -> None:
        start, done = ImageClassifier.on_train_batch_start, []

        def act_once(module, batch, batch_idx):
            start(module, batch, batch_idx)
            if module.global_step == step and not done:
                done.append(step)
                act()

        monkeypatch.setattr(ImageClassifier, "on_train_batch_start", act_once)

    return do
