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
