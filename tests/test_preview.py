"""`visattn preview`: the pictures of a configuration, before anything is trained."""

from pathlib import Path

import numpy as np
import pytest
from data_cases import COUNTS, make_tree
from PIL import Image

from visattn.__main__ import main
from visattn.commands.preview import TrainingPlan, draw_sheet, learning_rates, read_plan

CONFIG = """
model: {name: resnet8, image_size: 16, lr: 0.02, warmup_epochs: 1}
data: {batch_size: 5, num_workers: 0, augment: strong}
trainer: {max_epochs: 3, accelerator: cpu, devices: 1}
"""


@pytest.fixture
def config(tmp_path) -> Path:
    (tmp_path / "c.yaml").write_text(CONFIG)
    make_tree(tmp_path / "photos")
    return tmp_path / "c.yaml"


def preview(config: Path, *words) -> int:
    return main(["preview", str(config), *map(str, words)])


def test_preview_draws_and_trains_nothing(config, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    root = tmp_path / "photos"
    assert (
        preview(
            config, "--change", f"data.root='{root}' data.flip=true", "--images", 4, "--versions", 3
        )
        == 0
    )
    told = capsys.readouterr().out
    assert (
        "23 labels of 3 classes: ant 5, bee 7, cat 11" in told
        and "4 an epoch of 5 images, 12 in all" in told
    )
    assert "up to 0.02" in told
    for name in ("augmented.png", "learning_rate.png"):
        with Image.open(tmp_path / "preview" / name) as picture:
            assert picture.width > 300 and np.asarray(picture.convert("L")).std() > 5
    assert {path.name for path in tmp_path.iterdir()} == {"c.yaml", "photos", "preview"}


def parts_of(config: Path, *keys: str) -> TrainingPlan:
    root = str(config.parent / "photos")
    return read_plan(["--config", str(config), "--data.root", root, *keys])


def test_sheet_shows_what_training_will_see(config):
    data = parts_of(config).datamodule
    axes = draw_sheet(data, images=5, versions=2).axes
    assert len(axes) == 15
    assert [axes[row * 3].get_ylabel() for row in range(5)] == ["ant", "bee", "cat", "ant", "bee"]
    loader = data.train_dataloader()
    positions = [
        int(np.flatnonzero(loader.dataset.source.labels == label)[0]) for label in range(3)
    ]
    transform = loader.dataset.transform
    for row, position in enumerate(positions):
        image = loader.dataset.source.image(position, transform.long_side)
        for epoch in range(2):
            seen = np.asarray(axes[row * 3 + epoch + 1].images[0].get_array())
            np.testing.assert_array_equal(seen, transform.pixels(image, (epoch, position, 0)))


def test_curve_is_the_schedule_of_training(config):
    rates = learning_rates(parts_of(config, "--trainer.max_epochs", "5"))["learning rate"]
    steps, values = zip(*rates, strict=True)
    assert steps == tuple(range(20)) and sum(COUNTS["train"]) // 5 == 4
    assert values[:5] == pytest.approx([0.02 * part for part in (0.2, 0.4, 0.6, 0.8, 1.0)])
    assert list(values[4:]) == sorted(values[4:], reverse=True) and values[-1] < 0.001


def test_refusals(config, tmp_path, capsys):
    assert preview(tmp_path / "none.yaml") == 2
    assert "there is no config" in capsys.readouterr().err
    assert preview(config, "--images", 0) == 2
    assert "must be 1 or more, got 0 and 7" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stopped:
        preview(config, "--change", "data.rot=x")
    assert stopped.value.code == 2 and "did you mean 'data.root'" in capsys.readouterr().err
    assert preview(config, "--change", f"data.root={tmp_path / 'nowhere'}") == 2
    assert "there is no folder or zip file" in capsys.readouterr().err
