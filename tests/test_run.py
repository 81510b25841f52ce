"""The folder of a run, the classifier in it, and going on with a run that was stopped."""

import csv
import json
import shutil
import signal
import socket
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from training_cases import keys, same, weights

from visattn.training import cli
from visattn.training.checkpoint_io import KEY, read_checkpoint
from visattn.training.classifier import load_classifier
from visattn.training.module import ImageClassifier
from visattn.training.parser import parse
from visattn.training.run import validate
from visattn.training.run_folder import claim


def test_run_folder_is_complete(run, shapes):
    pictures = ("curves.png", "confusion.png", "attention/sample.png", "attention/step_0000014.png")
    for name in pictures:
        with Image.open(run / name) as picture:
            assert min(picture.size) > 100, name
    result = json.loads((run / "result.json").read_text())
    assert (result["steps"], result["epochs"], result["classes"]) == (
        14,
        2,
        ["bar", "disc", "line"],
    )
    with (run / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    accuracies = [float(row["val_accuracy"]) for row in rows if row["val_accuracy"]]
    assert len(accuracies) == 2
    assert result["val_accuracy"] == pytest.approx(max(accuracies))
    assert any((run / "tensorboard").iterdir())
    assert (run / "config.yaml").is_file()


def test_checkpoint_says_how_to_rebuild(run):
    note = read_checkpoint(run / "checkpoints" / "best.ckpt")[KEY]
    assert note["format"] == 1
    assert note["classes"] == ["bar", "disc", "line"]
    assert note["network"]["options"]["depth"] == 2
    assert note["transform"]["image_size"] == [16, 16]


@pytest.mark.parametrize(
    "images",
    ["photo.jpg", np.zeros((5, 5, 3), np.uint8), [], [None]],
    ids=lambda images: type(images).__name__,
)
def test_a_classifier_takes_pil_images_only(run, images):
    with pytest.raises(TypeError, match="PIL image"):
        load_classifier(run)(images)


def test_loaded_classifier_repeats_the_validation(run, shapes):
    classifier = load_classifier(run)
    assert not classifier.model.training
    files = sorted((shapes / "val").glob("*/*.png"))
    images = [Image.open(file) for file in files]
    probabilities = classifier(images)
    assert probabilities.shape == (21, 3)
    assert torch.allclose(probabilities.sum(1), torch.ones(21))
    assert torch.allclose(classifier(images[4]), probabilities[4], atol=1e-6)
    right = sum(
        classifier.classes[row.argmax()] == file.parent.name
        for row, file in zip(probabilities, files, strict=True)
    )
    assert right / 21 == pytest.approx(
        json.loads((run / "result.json").read_text())["val_accuracy"]
    )
    assert torch.equal(load_classifier(run / "checkpoints" / "best.ckpt")(images), probabilities)


def test_validate_counts_every_image(run, shapes, capsys):
    cli.main(["validate", *keys(shapes, run)])
    wanted = json.loads((run / "result.json").read_text())["val_accuracy"]
    assert f"({round(wanted * 21)} of 21 images)" in capsys.readouterr().out


def test_a_command_returns_its_run(run, shapes):
    _, config = parse(["validate", *keys(shapes, run)])
    result = validate(config)
    best_checkpoint = run / "checkpoints" / "best.ckpt"
    accuracy = json.loads((run / "result.json").read_text())["val_accuracy"]
    assert (result.folder, result.checkpoint) == (run, best_checkpoint)
    assert result.metrics["accuracy"] == pytest.approx(accuracy)
    assert f"accuracy    {accuracy:.4f}" in str(result)


def test_predict_writes_a_line_per_file(run, shapes, capsys):
    cli.main(["predict", *keys(shapes, run, data__predict_root=shapes / "val" / "disc")])
    with (run / "predictions.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    classifier = load_classifier(run)
    assert len(rows) == 7
    for row in rows:
        probabilities = classifier(Image.open(shapes / "val" / "disc" / Path(row["file"]).name))
        assert row["class"] == classifier.classes[probabilities.argmax()]
        assert float(row["probability"]) == pytest.approx(float(probabilities.max()), abs=1e-5)
    assert "7 images" in capsys.readouterr().out


def test_training_and_loading_reach_for_no_network(shapes, tmp_path, monkeypatch):
    asked = []
    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(
            socket.socket, name, lambda self, address, name=name: asked.append(address)
        )
    monkeypatch.setattr(
        socket, "getaddrinfo", lambda *address, **options: asked.append(address) or []
    )
    name = {"model__name": "timm:test_resnet", "model__options": "{}", "model__image_size": 32}
    cli.main(["fit", *keys(shapes, tmp_path / "run", **name, trainer__max_epochs=1)])
    assert load_classifier(tmp_path / "run").classes == ["bar", "disc", "line"]
    assert asked == []


def test_a_trial_leaves_the_run_alone(shapes, tmp_path):
    earlier = tmp_path / "run" / "checkpoints" / "best.ckpt"
    earlier.parent.mkdir(parents=True)
    earlier.touch()
    cli.main(["fit", *keys(shapes, tmp_path / "run", trainer__fast_dev_run="true")])
    assert list((tmp_path / "run").rglob("*.*")) == [earlier]
    assert json.loads((tmp_path / "run.trial" / "result.json").read_text())["steps"] == 1
    assert not (tmp_path / "run.1").exists()


def test_an_earlier_run_steps_aside(tmp_path):
    folder = tmp_path / "run"
    assert claim(folder, resumed=False) == ""
    (folder / "checkpoints" / "last.ckpt").write_text("first")
    assert claim(folder, resumed=True) == ""
    assert "run.1" in claim(folder, resumed=False)
    assert (tmp_path / "run.1" / "checkpoints" / "last.ckpt").read_text() == "first"
    assert not any((folder / "checkpoints").iterdir())


def test_a_checkpoint_of_another_run_leaves_this_one(run, shapes, tmp_path, capsys):
    shutil.copytree(run, tmp_path / "run")
    last = str(run / "checkpoints" / "last.ckpt")
    cli.main(["fit", *keys(shapes, tmp_path / "run", trainer__max_epochs=3), "--ckpt_path", last])
    assert same(
        weights(tmp_path / "run.1/checkpoints/last.ckpt"), weights(run / "checkpoints/last.ckpt")
    )
    assert "changed since" not in capsys.readouterr().out
    with (tmp_path / "run" / "metrics.csv").open(newline="") as file:
        assert min(int(row["step"]) for row in csv.DictReader(file)) >= 13


@pytest.mark.parametrize(("number", "step"), [(signal.SIGTERM, 9), (signal.SIGINT, 7)])
def test_a_stopped_run_goes_on_to_the_same_weights(
    number, step, run, shapes, tmp_path, capsys, monkeypatch
):
    start = ImageClassifier.on_train_batch_start

    def stop(module, batch, batch_idx):
        start(module, batch, batch_idx)
        if module.global_step == step:
            signal.raise_signal(number)

    handler = signal.getsignal(number)
    with monkeypatch.context() as patch:
        patch.setattr(ImageClassifier, "on_train_batch_start", stop)
        with pytest.raises(SystemExit) as left:
            cli.main(["fit", *keys(shapes, tmp_path / "cut")])
    assert left.value.code == 128 + number
    assert signal.getsignal(number) is handler
    assert "fit --config" in capsys.readouterr().err
    assert read_checkpoint(tmp_path / "cut/checkpoints/last.ckpt")["global_step"] == step + 1
    cli.main(["fit", "--config", str(tmp_path / "cut/config.yaml"), "--ckpt_path", "last"])
    assert same(
        weights(tmp_path / "cut/checkpoints/last.ckpt"), weights(run / "checkpoints/last.ckpt")
    )


def test_training_without_progress_stops_early(shapes, tmp_path):
    # no batch norm, whose statistics change without steps
    options = '{"dim": 16, "depth": 2, "num_heads": 2, "stem": "patch"}'
    changed = {"patience": 2, "model__options": options, "model__lr": 0.0, "trainer__max_epochs": 9}
    cli.main(["fit", *keys(shapes, tmp_path / "run", **changed)])
    assert json.loads((tmp_path / "run" / "result.json").read_text())["epochs"] == 3


def test_a_moved_run_keeps_its_best_checkpoint(shapes, tmp_path):
    run, moved = tmp_path / "run", tmp_path / "moved"
    cli.main(["fit", *keys(shapes, run, trainer__max_epochs=5, model__mixup=0, model__lr=0.01)])
    shutil.copytree(run, moved)
    best = weights(moved / "checkpoints" / "best.ckpt")
    state = read_checkpoint(moved / "checkpoints" / "last.ckpt")
    for name, value in state["state_dict"].items():
        if name.startswith("model.head"):
            value.zero_()  # every class is equally likely: no better than chance from here on
    torch.save(state, moved / "checkpoints" / "last.ckpt")
    worse = keys(shapes, moved, trainer__max_epochs=6, model__mixup=0, model__lr=0.0)
    cli.main(["fit", *worse, "--ckpt_path", "last"])
    before, after = (json.loads((folder / "result.json").read_text()) for folder in (run, moved))
    assert after["last"]["val_accuracy"] < before["val_accuracy"] == after["val_accuracy"]
    assert same(weights(moved / "checkpoints" / "best.ckpt"), best)


def test_resuming_keeps_the_metrics(run, shapes, tmp_path):
    cli.main(["fit", *keys(shapes, tmp_path / "more", trainer__max_epochs=1)])
    cli.main(
        ["fit", *keys(shapes, tmp_path / "more", trainer__max_epochs=3), "--ckpt_path", "last"]
    )
    with (tmp_path / "more" / "metrics.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["val_accuracy"]]
    assert [int(row["step"]) for row in rows] == [6, 13, 20]
    assert json.loads((tmp_path / "more" / "result.json").read_text())["epochs"] == 3


def test_the_command_line_wins_over_the_checkpoint(run, shapes, tmp_path):
    cli.main(["fit", *keys(shapes, tmp_path / "slow", trainer__max_epochs=1, model__lr=1e-3)])
    changed = {"trainer__max_epochs": 3, "model__lr": 1e-5, "model__weight_decay": 0.125}
    cli.main(["fit", *keys(shapes, tmp_path / "slow", **changed), "--ckpt_path", "last"])
    content = read_checkpoint(tmp_path / "slow" / "checkpoints" / "last.ckpt")
    groups = content["optimizer_states"][0]["param_groups"]
    assert {group["initial_lr"] for group in groups} == {1e-5}
    assert all(group["lr"] <= 1e-5 for group in groups)
    assert {group["weight_decay"] for group in groups} == {0.0, 0.125}


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({"weight_decay": 0.05}, {"weight_decay": 0.0}),
        ({"layer_decay": 0.75}, {"layer_decay": 0.5}),
    ],
)
def test_changed_decay_wins_over_the_checkpoint(before, after, shapes, tmp_path):
    first, second = (
        {f"model__{key}": value for key, value in side.items()} for side in (before, after)
    )
    cli.main(["fit", *keys(shapes, tmp_path / "run", trainer__max_epochs=1, **first)])
    cli.main(["fit", *keys(shapes, tmp_path / "run", **second), "--ckpt_path", "last"])
    cli.main(["fit", *keys(shapes, tmp_path / "fresh", trainer__max_epochs=1, **second)])
    states = [
        read_checkpoint(tmp_path / name / "checkpoints/last.ckpt") for name in ("run", "fresh")
    ]
    groups = [state["optimizer_states"][0]["param_groups"] for state in states]
    for key in ("weight_decay", "initial_lr", "lr_scale", "param_names"):
        assert [group.get(key) for group in groups[0]] == [group.get(key) for group in groups[1]], (
            key
        )
