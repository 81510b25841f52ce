"""The commands about blocks: `visattn blocks` and `visattn compare`."""

import json

import pytest

from visattn.__main__ import main
from visattn.blocks.table import BLOCKS
from visattn.commands import compare


def test_blocks_lists_every_block(capsys):
    assert main(["blocks", "--channels", "64", "--height", "5", "--width", "4", "--repeats", "0"]) == 0
    output = capsys.readouterr().out
    lines = {line.split("|")[1].strip(): line for line in output.splitlines() if line.startswith("| ")}
    assert set(lines) == {"block", *BLOCKS}
    assert "(2, 64, 5, 4)" in output
    cells = [cell.strip() for cell in lines["se"].split("|")[1:-1]]
    # 64 -> 4 -> 64 with biases; two multiply-adds per weight
    assert cells[:5] == ["se", "channel", "2018", "580", f"{2 * 2 * 64 * 4 / 1e6:.3g}"]
    assert cells[5:] == ["-", "-", "channel", "paper, timm"]


def test_blocks_measures_and_notes_what_does_not_fit(capsys):
    assert main(["blocks", "--channels", "6", "--height", "3", "--width", "3", "--repeats", "1", "--block", "sk"]) == 0
    assert "sk: channels must be a multiple of groups; got 6 and 32" in capsys.readouterr().out
    assert main(["blocks", "--channels", "8", "--height", "3", "--width", "3", "--repeats", "1", "--block", "eca"]) == 0
    cells = [cell.strip() for cell in capsys.readouterr().out.splitlines()[-2].split("|")[1:-1]]
    assert float(cells[5]) >= 0 and float(cells[6]) >= 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["blocks", "--block", "cbm"], "did you mean 'cbam'"),
        (["blocks", "--kind", "chanel"], "classes are channel"),
        (["blocks", "--batch", "1"], "batch must be 2 or more"),
        (["compare", "nowhere.yaml"], "there is no config 'nowhere.yaml'"),
        (["compare", "nowhere.yaml", "--blocks", "none,cbm"], "did you mean 'cbam'"),
        (["compare", "nowhere.yaml", "--seeds", "1"], "seeds must be 2 or more"),
    ],
)
def test_refusals(arguments, message, capsys):
    assert main(arguments) == 2
    assert message in capsys.readouterr().err


def test_compare_prints_mean_and_spread_and_runs_nothing_twice(tmp_path, capsys, monkeypatch):
    accuracies = {"none": [0.5, 0.6, 0.7], "se": [0.7, 0.7, 0.7]}
    calls = []

    def train(arguments):
        folder, seed = tmp_path / "out", int(arguments[arguments.index("--seed_everything") + 1])
        name = arguments[arguments.index("--model.block") + 1] if "--model.block" in arguments else "none"
        calls.append((name, seed))
        folder = folder / f"{name}-seed{seed}"
        assert arguments[arguments.index("--out") + 1] == str(folder)
        folder.mkdir(parents=True)
        result = {"val_accuracy": accuracies[name][seed], "seconds": 12.0, "parameters": 1234}
        (folder / "result.json").write_text(json.dumps(result))

    monkeypatch.setattr("visattn.training.cli.main", train)
    config = tmp_path / "host.yaml"
    config.write_text("")
    for _ in range(2):
        assert main(["compare", str(config), "--blocks", "none,se", "--out", str(tmp_path / "out")]) == 0
    assert calls == [(name, seed) for seed in range(3) for name in ("none", "se")]
    output = capsys.readouterr().out
    assert "| none  | 60.00 ± 10.00 | -" in output
    assert "| se    | 70.00 ± 0.00  | +10.00 ± 7.07" in output
    assert "1,234" in output


def test_rows_without_the_plain_network():
    results = {"se": [{"val_accuracy": a, "seconds": 3.0, "parameters": 5} for a in (0.25, 0.75)]}
    assert compare.rows(results) == [("se", "50.00 ± 35.36", "-", "5", "3", 2)]


@pytest.mark.slow
def test_compare_trains(tmp_path, capsys):
    config = tmp_path / "host.yaml"
    config.write_text(
        "model: {name: resnet8, image_size: 24, lr: 0.01}\n"
        "data: {dataset: synthetic, batch_size: 8, num_workers: 0}\n"
        "trainer: {max_epochs: 1, limit_train_batches: 2, limit_val_batches: 1, enable_progress_bar: false}\n"
    )
    out = tmp_path / "out"
    assert main(["compare", str(config), "--blocks", "none,se", "--seeds", "2", "--out", str(out)]) == 0
    plain, gated = (json.loads((out / f"{name}-seed1" / "result.json").read_text()) for name in ("none", "se"))
    assert gated["parameters"] > plain["parameters"] and "± " in capsys.readouterr().out
