"""The real commands in a row: train, map, export; killed runs resume; two processes are one."""

import csv
import json
import re
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from journey_cases import REPOSITORY, command, run_to_the_end, small_options
from PIL import Image

from visattn.training import cli
from visattn.training.checkpoint_io import read_checkpoint
from visattn.training.classifier import load_classifier


def weights(path: Path) -> dict:
    return read_checkpoint(path)["state_dict"]


def same(first: dict, second: dict) -> bool:
    return first.keys() == second.keys() and all(
        torch.equal(first[key], second[key]) for key in first
    )


def test_from_training_to_a_map(tmp_path):
    said = run_to_the_end(command("fit", *small_options(tmp_path / "run", overlays=3)))
    assert "validation accuracy" in said
    assert "img/s" in said
    following = re.search(r"visattn (map \S+ --model \S+) --out out/", said)
    maps = [sys.executable, "-m", "visattn", *following[1].split(), "--out", str(tmp_path / "maps")]
    run_to_the_end(maps)
    entries = json.loads((tmp_path / "maps" / "index.json").read_text())
    assert entries
    pictures = sorted((tmp_path / "maps").glob("*.png"))
    assert pictures
    with (
        Image.open(pictures[0]) as picture,
        Image.open(tmp_path / "run/attention/sample.png") as sample,
    ):
        assert picture.size[0] > sample.size[0]
        assert picture.convert("RGB").getcolors(2**24) != sample.convert("RGB").getcolors(2**24)
    assert list((tmp_path / "maps").glob("*.npz"))


def test_a_killed_run_goes_on_to_the_same_weights(tmp_path):
    cli.main(["fit", *small_options(tmp_path / "whole", trainer__enable_progress_bar="false")])
    cut = tmp_path / "cut" / "checkpoints" / "last.ckpt"
    arguments = small_options(tmp_path / "cut", checkpoint_steps=2)
    process = subprocess.Popen(
        command("fit", *arguments),
        cwd=REPOSITORY,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    while not cut.is_file() and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert process.returncode == -signal.SIGKILL, "it ended before it could be killed"
    assert read_checkpoint(cut)["global_step"] < 18
    cli.main(["fit", *arguments, "--ckpt_path", "last", "--trainer.enable_progress_bar", "false"])
    assert same(weights(cut), weights(tmp_path / "whole" / "checkpoints" / "last.ckpt"))
    with (tmp_path / "cut" / "metrics.csv").open(newline="") as file:
        assert {17} == {
            int(row["step"])
            for row in csv.DictReader(file)
            if row["val_accuracy"] and int(row["step"]) > 8
        }


def some_images(root: Path, train: int = 8, val: int = 7) -> Path:
    """A folder with a few of the embedded images of three classes: 24 to train, 21 to validate."""
    with zipfile.ZipFile(REPOSITORY / "assets" / "writing_systems.zip") as archive:
        for split, count in (("train", train), ("val", val)):
            for name in ("Greek", "Korean", "Latin"):
                files = [
                    file
                    for file in archive.namelist()
                    if f"{split}/{name}/" in file and file.endswith(".png")
                ]
                for number, file in enumerate(files[:count]):
                    path = root / split / name / f"{number}.png"
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_bytes(archive.read(file))
    return root


def test_two_processes_train_and_count_every_image_once(tmp_path, capsys):
    small = {
        "model__name": "resnet8",
        "model__options": "{}",
        "data__root": some_images(tmp_path / "few"),
    }
    small |= {"data__batch_size": 5, "trainer__max_epochs": 8, "model__ema": 0.8}
    small |= {
        "model__freeze": "conv1",
        "model__unfreeze_epoch": 2,
    }  # which all processes must do together
    both = {**small, "trainer__devices": 2, "trainer__strategy": "ddp"}
    # one process gets 11 images in 3 batches, the other 10 in 2: waiting for each other in every
    # batch would hang
    run_to_the_end(command("fit", *small_options(tmp_path / "run", **both)))
    assert json.loads((tmp_path / "run" / "result.json").read_text())["steps"] == 16
    by_two = run_to_the_end(command("validate", *small_options(tmp_path / "run", **both)))
    capsys.readouterr()
    cli.main(["validate", *small_options(tmp_path / "run", **small)])
    counts = [
        re.search(r"\((\d+) of (\d+) images\)", said).groups()
        for said in (by_two, capsys.readouterr().out)
    ]
    assert counts[0] == counts[1]
    assert counts[0][1] == "21"


def test_two_processes_share_the_parameters_and_go_on(tmp_path):
    small = {
        "model__image_size": 16,
        "data__root": some_images(tmp_path / "few"),
        "data__batch_size": 5,
    }
    small |= {
        "trainer__devices": 2,
        "trainer__strategy": "fsdp",
        "model__channels_last": "false",
        "overlays": 2,
    }
    # one process validates 3 batches, the other 2, and each batch takes the shards of both
    run_to_the_end(command("fit", *small_options(tmp_path / "run", **small, trainer__max_epochs=1)))
    with (tmp_path / "run" / "classes.csv").open(newline="") as file:
        assert sum(int(row["images"]) for row in csv.DictReader(file)) == 21
    first = read_checkpoint(tmp_path / "run" / "checkpoints" / "last.ckpt")
    run_to_the_end(command("fit", *small_options(tmp_path / "run", **small), "--ckpt_path", "last"))
    second = read_checkpoint(tmp_path / "run" / "checkpoints" / "last.ckpt")
    assert second["global_step"] == 2 * first["global_step"]
    moments = [content["optimizer_states"][0]["state"][0]["step"] for content in (first, second)]
    assert [int(step) for step in moments] == [
        first["global_step"],
        second["global_step"],
    ]  # it went on
    assert not same(first["state_dict"], second["state_dict"])
    classifier = load_classifier(tmp_path / "run")  # one process reads what several wrote
    assert len(classifier(Image.new("RGB", (20, 20)))) == 3


@pytest.mark.slow
def test_a_run_killed_five_times_ends_with_the_same_weights(tmp_path):
    small = {"trainer__max_epochs": 3, "trainer__limit_train_batches": 20, "model__ema": 0.9}
    cli.main(
        ["fit", *small_options(tmp_path / "whole", trainer__enable_progress_bar="false", **small)]
    )
    cut, generator = tmp_path / "cut" / "checkpoints" / "last.ckpt", np.random.default_rng(0)
    arguments, again = small_options(tmp_path / "cut", checkpoint_steps=1, **small), []
    for wanted in np.sort(generator.choice(np.arange(2, 56), 5, replace=False)).tolist():
        process = subprocess.Popen(
            command("fit", *arguments, *again),
            cwd=REPOSITORY,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        while process.poll() is None and not (
            cut.is_file() and read_checkpoint(cut)["global_step"] >= wanted
        ):
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert process.returncode == -signal.SIGKILL, "it ended before it could be killed"
        again = ["--ckpt_path", "last"]
    cli.main(["fit", *arguments, *again, "--trainer.enable_progress_bar", "false"])
    ends = [
        read_checkpoint(path) for path in (cut, tmp_path / "whole" / "checkpoints" / "last.ckpt")
    ]
    for part in ("state_dict", "current_model_state"):
        assert same(ends[0][part], ends[1][part]), part
