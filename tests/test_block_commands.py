"""The commands about blocks: `visattn blocks` and `visattn compare`."""

import json
from pathlib import Path

import pytest
import timm
import torch
import yaml
from training_cases import keys, weights

from visattn.__main__ import main
from visattn.blocks.catalog import BLOCKS
from visattn.blocks.cbam import CBAM
from visattn.commands import compare
from visattn.surgery import insert


def test_blocks_lists_every_block(capsys):
    assert (
        main(["blocks", "--channels", "64", "--height", "5", "--width", "4", "--repeats", "0"]) == 0
    )
    output = capsys.readouterr().out
    lines = {
        line.split("|")[1].strip(): line for line in output.splitlines() if line.startswith("| ")
    }
    assert set(lines) == {"block", *BLOCKS}
    assert "(2, 64, 5, 4)" in output
    cells = [cell.strip() for cell in lines["se"].split("|")[1:-1]]
    # 64 -> 4 -> 64 with biases; two multiply-adds per weight
    assert cells[:5] == ["se", "channel", "2018", "580", f"{2 * 2 * 64 * 4 / 1e6:.3g}"]
    assert cells[5:] == ["-", "-", "channel", "paper, timm"]


def test_blocks_measures_and_notes_what_does_not_fit(capsys):
    assert (
        main(
            [
                "blocks",
                "--channels",
                "6",
                "--height",
                "3",
                "--width",
                "3",
                "--repeats",
                "1",
                "--block",
                "sk",
            ]
        )
        == 0
    )
    assert "sk: channels must be a multiple of groups; got 6 and 32" in capsys.readouterr().out
    assert (
        main(
            [
                "blocks",
                "--channels",
                "8",
                "--height",
                "3",
                "--width",
                "3",
                "--repeats",
                "1",
                "--block",
                "eca",
            ]
        )
        == 0
    )
    cells = [cell.strip() for cell in capsys.readouterr().out.splitlines()[-2].split("|")[1:-1]]
    assert float(cells[5]) >= 0 and float(cells[6]) >= 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["blocks", "--block", "cbm"], "did you mean 'cbam'"),
        (["blocks", "--family", "chanel"], "classes are channel"),
        (["blocks", "--batch", "1"], "batch must be 2 or more"),
        (["compare", "nowhere.yaml"], "there is no config 'nowhere.yaml'"),
        (["compare", "configs/blocks_compare.yaml", "--blocks", "none,cbm"], "did you mean 'cbam'"),
        (["compare", "nowhere.yaml", "--seeds", "1"], "seeds must be 2 or more"),
    ],
)
def test_refusals(arguments, message, capsys):
    assert main(arguments) == 2
    assert message in capsys.readouterr().err


def test_compare_prints_mean_and_spread_and_runs_nothing_twice(tmp_path, capsys, monkeypatch):
    accuracies = {"none": [0.5, 0.6, 0.7], "se": [0.7, 0.7, 0.7]}
    plain = {"name": "resnet8", "options": {"in_channels": 1}}
    gated = {"block": "se", "options": {"in_channels": 1, "block_options": {"reduction": 4}}}
    hosts = {"none": plain, "se": plain | gated}
    calls = []

    def train(arguments):
        folder, seed = tmp_path / "out", int(arguments[arguments.index("--seed_everything") + 1])
        model = yaml.safe_load(Path(arguments[arguments.index("--config") + 1]).read_text())[
            "model"
        ]
        name = model.get("block", "none")
        assert model == hosts[name]
        calls.append((name, seed))
        folder = folder / f"{name}-seed{seed}"
        assert arguments[arguments.index("--out") + 1] == str(folder)
        folder.mkdir(parents=True)
        result = {"val_accuracy": accuracies[name][seed], "seconds": 12.0, "parameters": 1234}
        (folder / "result.json").write_text(json.dumps(result))

    monkeypatch.setattr("visattn.training.cli.main", train)
    config = tmp_path / "host.yaml"
    config.write_text(
        yaml.safe_dump({"model": plain, "blocks": {"none": None, "se": {"reduction": 4}}})
    )
    for _ in range(2):
        assert main(["compare", str(config), "--out", str(tmp_path / "out")]) == 0
    assert calls == [(name, seed) for seed in range(3) for name in ("none", "se")]
    output = capsys.readouterr().out
    assert "| none  | 60.00 ± 10.00 | -" in output
    assert "| se    | 70.00 ± 0.00  | +10.00 ± 7.07" in output
    assert "1,234" in output


def test_compare_takes_options_from_the_config_and_keeps_configs_apart(
    tmp_path, capsys, monkeypatch
):
    config, out = tmp_path / "host.yaml", tmp_path / "out"
    trained = []
    monkeypatch.setattr("visattn.training.cli.main", lambda arguments: trained.append(arguments))
    monkeypatch.setattr(
        compare, "read_result", lambda *_: {"val_accuracy": 0.5, "seconds": 1.0, "parameters": 1}
    )
    for options, code in (({"groups": 4}, 0), ({"groups": 2}, 2)):
        config.write_text(
            yaml.safe_dump(
                {"model": {"name": "resnet8"}, "blocks": {"none": None, "shuffle": options}}
            )
        )
        assert main(["compare", str(config), "--blocks", "shuffle", "--out", str(out)]) == code
    assert "the runs of 'shuffle'" in capsys.readouterr().err and len(trained) == 3
    written = yaml.safe_load((out / "shuffle.yaml").read_text())
    assert written == {
        "model": {
            "name": "resnet8",
            "block": "shuffle",
            "options": {"block_options": {"groups": 4}},
        }
    }
    assert not (out / "none.yaml").exists()


def test_compare_gives_no_network_the_block_of_the_config(tmp_path, monkeypatch):
    config, out = tmp_path / "host.yaml", tmp_path / "out"
    monkeypatch.setattr("visattn.training.cli.main", lambda arguments: None)
    monkeypatch.setattr(
        compare, "read_result", lambda *_: {"val_accuracy": 0.5, "seconds": 1.0, "parameters": 1}
    )
    options = {"in_channels": 1, "block_options": {"reduction": 4}}
    model = {"name": "resnet8", "block": "se", "options": options}
    config.write_text(
        yaml.safe_dump(
            {"model": model, "blocks": {"none": None, "eca": None, "shuffle": {"groups": 4}}}
        )
    )
    assert main(["compare", str(config), "--out", str(out)]) == 0
    plain = {"name": "resnet8", "options": {"in_channels": 1}}
    grouped = {"in_channels": 1, "block_options": {"groups": 4}}
    written = {
        name: yaml.safe_load((out / f"{name}.yaml").read_text())["model"]
        for name in ("none", "eca", "shuffle")
    }
    assert written["none"] == plain
    assert written["eca"] == plain | {"block": "eca"}
    assert written["shuffle"] == plain | {"block": "shuffle", "options": grouped}


def test_compare_without_blocks_is_refused(tmp_path, capsys):
    config = tmp_path / "host.yaml"
    config.write_text("model: {name: resnet8}\n")
    assert main(["compare", str(config)]) == 2
    assert "there is no block to compare" in capsys.readouterr().err


def test_rows_without_the_plain_network():
    results = {"se": [{"val_accuracy": a, "seconds": 3.0, "parameters": 5} for a in (0.25, 0.75)]}
    assert compare.rows(results) == [("se", "50.00 ± 35.36", "-", "5", "3", 2)]


@pytest.mark.slow
def test_compare_trains(tmp_path, capsys):
    config = tmp_path / "host.yaml"
    config.write_text(
        "model: {name: resnet8, image_size: 24, lr: 0.01}\n"
        "blocks: {none: , shuffle: {groups: 4}}\n"
        "data: {dataset: synthetic, batch_size: 8, num_workers: 0}\n"
        "trainer: {max_epochs: 1, limit_train_batches: 2, limit_val_batches: 1, enable_progress_bar: false}\n"
    )
    out = tmp_path / "out"
    assert main(["compare", str(config), "--seeds", "2", "--out", str(out)]) == 0
    plain, gated = (
        json.loads((out / f"{name}-seed1" / "result.json").read_text())
        for name in ("none", "shuffle")
    )
    assert gated["parameters"] > plain["parameters"] and "± " in capsys.readouterr().out


def test_a_network_of_timm_is_fine_tuned_with_an_inserted_block(shapes, tmp_path):
    from visattn.training import cli

    changed = {
        "model.name": "timm:resnet10t",
        "model.image_size": 32,
        "model.options": None,
        "model.mixup": 0,
    }
    limits = {
        "trainer.max_epochs": 1,
        "trainer.limit_train_batches": 2,
        "trainer.limit_val_batches": 1,
    }
    cli.main(
        ["fit", *keys(shapes, tmp_path / "run", **changed, **limits, **{"model.insert": "cbam"})]
    )
    state = weights(tmp_path / "run" / "checkpoints" / "last.ckpt")
    fades = [value for name, value in state.items() if name.endswith("inserted.gamma")]
    assert len(fades) == 4 and all(
        value != 0 for value in fades
    )  # one for each residual block, and all have learned


def test_a_resnet_of_timm_gives_what_it_gave_with_cbam_inserted():
    model, x = timm.create_model("resnet50").eval(), torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        before = model(x)
        insert(model, "cbam", where="layer[1-4].*")
        assert sum(type(part) is CBAM for part in model.modules()) == 16
        assert torch.equal(model(x), before)
