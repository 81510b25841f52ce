"""`visattn score`: intervals, baselines, and a model whose explanation is known."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from run_cases import untrained_run

from visattn.__main__ import main
from visattn.commands.score import (
    BASELINES,
    Interval,
    bootstrap,
    center_spot,
    format_table,
    read_samples,
    spread_evenly,
)
from visattn.data.synthetic import TARGETS, PlacedCharacters
from visattn.metrics.truth import energy_pointing, pointing_game, segmentation
from visattn.training.classifier import load_classifier


@pytest.fixture
def run_folder(tmp_path):
    return untrained_run(tmp_path / "run", list(TARGETS))


def score(*arguments):
    return main(["score", *map(str, arguments)])


def test_known_truth_adds_measures_of_place(tmp_path, run_folder, capsys):
    options = [
        "--methods",
        "rollout,gae",
        "--limit",
        6,
        "--steps",
        3,
        "--batch-size",
        4,
        "--out",
        tmp_path / "out",
    ]
    assert score("--model", run_folder, "--data", "synthetic", *options) == 0
    result = json.loads((tmp_path / "out" / "scores.json").read_text("utf-8"))
    assert list(result["scores"]) == ["rollout", "gae", *BASELINES]
    for name, row in result["scores"].items():
        assert (
            set(row)
            == set(result["better"])
            == {"insertion", "deletion", "pointing", "energy", "overlap"}
        )
        for key, entry in row.items():
            values = result["values"][name][key]
            assert len(values) == 6 and np.mean(values) == pytest.approx(entry["mean"], abs=1e-6)
            assert entry["low"] <= entry["mean"] <= entry["high"]
    assert all(name in capsys.readouterr().out for name in ("scores.png",))
    with Image.open(tmp_path / "out" / "scores.png") as plot:
        assert plot.width > plot.height


def test_photographs_are_scored_without_truth(tmp_path, run_folder, capsys):
    (tmp_path / "photos").mkdir()
    Image.effect_noise((40, 30), 60).save(tmp_path / "photos" / "a.png")
    (tmp_path / "photos" / "broken.png").write_bytes(b"")
    options = ["--methods", "raw", "--steps", 2, "--out", tmp_path / "out"]
    assert score("--model", run_folder, "--data", tmp_path / "photos", *options) == 1
    said = capsys.readouterr()
    assert "broken.png" in said.err and "1 images" in said.out
    scores = json.loads((tmp_path / "out" / "scores.json").read_text("utf-8"))["scores"]
    assert set(scores["raw"]) == {"insertion", "deletion"}


def test_scores_are_the_same_twice(tmp_path, run_folder):
    found = []
    for folder, size in (("a", 2), ("b", 2)):
        options = [
            "--methods",
            "rollout",
            "--limit",
            4,
            "--steps",
            2,
            "--batch-size",
            size,
            "--out",
            tmp_path / folder,
        ]
        score("--model", run_folder, "--data", "synthetic", *options)
        found.append(json.loads((tmp_path / folder / "scores.json").read_text("utf-8"))["values"])
    assert found[0] == found[1]


def test_intervals_shrink_with_the_root_of_the_images_and_hold_the_mean():
    values = torch.randn(4000, generator=torch.Generator().manual_seed(1))
    many, few = bootstrap(values, 0), bootstrap(values[:40], 0)
    # the 95 % interval of a normal mean is 2 * 1.96 / sqrt(n) wide
    assert many.high - many.low == pytest.approx(3.92 / 4000**0.5, rel=0.15)
    assert few.high - few.low == pytest.approx(3.92 / 40**0.5, rel=0.3)
    assert many.low < values.mean() < many.high
    assert bootstrap(torch.full((5,), 0.25), 0) == (0.25, 0.25, 0.25)


def test_the_best_of_a_column_depends_on_what_is_good():
    rows = {
        name: {"insertion": Interval(x, x, x), "deletion": Interval(x, x, x)}
        for name, x in (("a", 0.1), ("b", 0.9))
    }
    cells = [
        [cell.strip() for cell in line.split("|")[2:4]]
        for line in format_table(rows, 3).splitlines()[2:4]
    ]
    assert cells == [
        ["0.100 [0.100, 0.100]", "**0.100** [0.100, 0.100]"],
        ["**0.900** [0.900, 0.900]", "0.900 [0.900, 0.900]"],
    ]


def test_maps_of_zeros_are_scored_and_counted(tmp_path, run_folder, capsys):
    """Nothing speaks for theta: a batch of it alone has zero maps only, one with others some."""
    path = run_folder / "checkpoints" / "best.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["state_dict"]["model.head.weight"][1] = 0
    torch.save(checkpoint, path)
    options = ["--methods", "gae", "--limit", 7, "--steps", 2, "--out", tmp_path / "out"]
    for size in (1, 7):
        assert (
            score("--model", run_folder, "--data", "synthetic", "--batch-size", size, *options) == 0
        )
        assert "gae: the maps of 2 images are zero" in capsys.readouterr().out
        result = json.loads((tmp_path / "out" / "scores.json").read_text("utf-8"))
        assert result["zero_maps"] == {"gae": 2}
        assert np.array(result["values"]["gae"]["energy"])[[1, 6]].tolist() == [0, 0]


def test_baselines_get_what_theory_says():
    """Random maps hold a share of their mass on the truth like its share of the picture, and point there as often."""
    shown = PlacedCharacters("test", image_size=(64, 64), length=600, with_truth=True)
    truth = torch.stack([shown[i][2] for i in range(600)])
    heat = torch.rand(600, 8, 8, generator=torch.Generator().manual_seed(0))
    share = truth.float().mean((1, 2))
    energy, pointing = energy_pointing(heat, truth), pointing_game(heat, truth, 4)
    assert energy.mean().item() == pytest.approx(share.mean().item(), rel=0.05)
    near = F.max_pool2d(
        truth[:, None].float(), 9, 1, 4
    ).mean()  # a square, so a little more than the disk
    assert share.mean() < pointing.mean() < near
    # half of the pixels are guessed: of the object f/2 of f/2 + 1/2 overlap, of the ground (1-f)/2
    # of 1 - f/2
    f = share.mean().item()
    expected = (f / 2 / (f / 2 + 0.5) + (1 - f) / 2 / (1 - f / 2)) / 2
    assert segmentation(heat, truth).iou.mean().item() == pytest.approx(expected, rel=0.05)


def test_every_class_of_the_synthetic_set_is_scored(run_folder):
    samples, failed = read_samples("synthetic", load_classifier(run_folder), 10)
    assert [sample.label for sample in samples] == [0, 1, 2, 3, 4] * 2 and not failed
    assert all(sample.truth.any() and sample.truth.shape == (24, 24) for sample in samples)


def test_center_and_even_choice():
    spot = center_spot((2, 5, 7))
    assert spot.shape == (2, 5, 7) and spot[1].argmax() == 2 * 7 + 3
    assert torch.equal(spot, spot.flip(1, 2)) and center_spot((1, 1, 1)).item() == 1
    assert spread_evenly(10, 3) == [0, 3, 6] and spread_evenly(2, 5) == [0, 1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--methods", "rollout,gea"], "did you mean 'gae'"),
        (["--methods", ","], "at least one method"),
        (["--limit", "0"], "--limit must be 1 or more"),
        (["--batch-size", "0"], "--batch-size must be 1 or more, got 0"),
        (["--data", "nowhere"], "nowhere"),
        ([], "--data requires an argument"),
    ],
)
def test_refusals(tmp_path, run_folder, capsys, arguments, message):
    data = [] if "--data" in arguments or not arguments else ["--data", "synthetic"]
    assert score("--model", run_folder, "--out", tmp_path / "out", *data, *arguments) == 2
    assert message in capsys.readouterr().err


def test_synthetic_data_need_a_model_of_their_classes(tmp_path, capsys):
    options = ["--random", "--data", "synthetic", "--out", tmp_path / "out"]
    assert score("--model", "timm:test_vit", *options) == 2
    assert "alpha, theta, xi, phi, omega" in capsys.readouterr().err
