"""The running average of the weights: its arithmetic, what it validates and saves, resuming."""

import json
import signal
from pathlib import Path

import pytest
import torch
from PIL import Image
from training_cases import keys, refusal, same, weights

from visattn.training import cli
from visattn.training.callbacks.weight_average import AverageWeights
from visattn.training.checkpoint_io import read_checkpoint
from visattn.training.classifier import load_classifier
from visattn.training.module import ImageClassifier


@pytest.fixture(scope="module")
def averaged(shapes, tmp_path_factory) -> tuple[Path, list[dict]]:
    """A run of two epochs of seven steps, and the weights after every step."""
    steps = []

    def remember(self, trainer, pl_module, outputs, batch, batch_idx):
        update(self, trainer, pl_module, outputs, batch, batch_idx)
        steps.append({key: value.clone() for key, value in pl_module.state_dict().items()})

    out, update = tmp_path_factory.mktemp("runs") / "averaged", AverageWeights.on_train_batch_end
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AverageWeights, "on_train_batch_end", remember)
        cli.main(["fit", *keys(shapes, out, model__ema=0.6, overlays=2)])
    return out, steps


def test_the_average_is_the_recursion(averaged):
    run, steps = averaged
    assert len(steps) == 14
    expected = steps[0]
    for count, step in enumerate(steps[1:], 1):
        decay = min(0.6, (1 + count) / (10 + count))
        expected = {
            key: decay * value + (1 - decay) * step[key] if value.is_floating_point() else step[key]
            for key, value in expected.items()
        }
    content = read_checkpoint(run / "checkpoints" / "last.ckpt")
    torch.testing.assert_close(content["state_dict"], expected)
    assert same(content["current_model_state"], steps[-1])
    assert not same(content["state_dict"], steps[-1])


def test_the_average_is_what_is_validated_and_kept(averaged, shapes):
    run, _ = averaged
    files = sorted((shapes / "val").glob("*/*.png"))
    classifier = load_classifier(run)
    answers = classifier([Image.open(file) for file in files]).argmax(1).tolist()
    right = sum(
        classifier.classes[answer] == file.parent.name
        for answer, file in zip(answers, files, strict=True)
    )
    assert right / 21 == pytest.approx(
        json.loads((run / "result.json").read_text())["val_accuracy"]
    )


def test_pictures_show_the_average_and_training_ends_with_it(shapes, tmp_path, monkeypatch):
    seen, modules = [], []

    def look(model, images):
        seen.append({key: value.clone() for key, value in model.state_dict().items()})
        raise ValueError("seen")

    monkeypatch.setattr("visattn.training.reports.attention_overlays.explain_batch", look)
    monkeypatch.setattr(ImageClassifier, "on_fit_end", lambda module: modules.append(module))
    with pytest.raises(ValueError, match="seen"):
        cli.main(
            [
                "fit",
                *keys(shapes, tmp_path / "a", model__ema=0.9, overlays=1, trainer__max_epochs=1),
            ]
        )
    cli.main(["fit", *keys(shapes, tmp_path / "b", model__ema=0.9, trainer__max_epochs=1)])
    final = weights(tmp_path / "b" / "checkpoints" / "last.ckpt")
    assert same(modules[0].state_dict(), final)
    assert same({f"model.{key}": value for key, value in seen[0].items()}, final)


def test_a_stopped_run_goes_on_to_the_same_average(averaged, shapes, tmp_path, monkeypatch):
    start = ImageClassifier.on_train_batch_start

    def stop(module, batch, batch_idx):
        start(module, batch, batch_idx)
        if module.global_step == 9:
            signal.raise_signal(signal.SIGTERM)

    again = keys(shapes, tmp_path / "cut", model__ema=0.6)
    with monkeypatch.context() as patch:
        patch.setattr(ImageClassifier, "on_train_batch_start", stop)
        with pytest.raises(SystemExit):
            cli.main(["fit", *again])
    cli.main(["fit", *again, "--ckpt_path", "last"])
    ends = [
        read_checkpoint(folder / "checkpoints" / "last.ckpt")
        for folder in (tmp_path / "cut", averaged[0])
    ]
    for part in ("state_dict", "current_model_state", "averaging_state"):
        assert same(ends[0][part], ends[1][part]), part


@pytest.mark.parametrize("order", [(0.0, 0.9), (0.9, 0.0)])
def test_the_average_can_be_turned_on_and_off_on_resume(order, shapes, tmp_path):
    for epochs, ema in enumerate(order, 1):
        again = ["--ckpt_path", "last"] if epochs > 1 else []
        cli.main(
            [
                "fit",
                *keys(shapes, tmp_path / "run", model__ema=ema, trainer__max_epochs=epochs),
                *again,
            ]
        )
    content = read_checkpoint(tmp_path / "run" / "checkpoints" / "last.ckpt")
    assert content["global_step"] == 14
    assert ("current_model_state" in content) == bool(order[1])


@pytest.mark.parametrize("wrong", ["1", "-0.1"])
def test_a_decay_out_of_range_is_refused(wrong, shapes, tmp_path, capsys):
    assert "ema must lie in [0, 1)" in refusal(
        ["fit", *keys(shapes, tmp_path / "run", model__ema=wrong)], capsys
    )
