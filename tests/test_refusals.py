"""What goes wrong in a training: one line that names it, and nothing lost."""

import pytest
import torch
from training_cases import draw_folder, keys, refusal, weights

from visattn.training import cli
from visattn.training.checkpoint_io import find_checkpoint
from visattn.training.classifier import load_classifier
from visattn.training.parser_errors import explain_parser_error


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        (["--model.nam", "x"], "'model.name'"),
        (["--modle.lr", "1"], "'model.lr'"),
        (["--maxepochs", "3"], "'trainer.max_epochs'"),
        (["--model.lr", "much"], "model.lr"),
        (["--data.image_size", "3"], "model.image_size"),
        (["--model.name", "vit_nan"], "'vit_nano'"),
        (["--model.options.dpth", "3"], "'depth'"),
        (["--model.optimizer", "adamwx"], "'adamw'"),
        (["--model.lr", "-1"], "lr must be 0 or more"),
        (["--model.label_smoothing", "2"], "label_smoothing"),
        (["--model.num_classes", "3"], "counted in the data"),
        (["--trainer.accelerator", "tpu"], "torch_xla"),
        (["--trainer.precision", "bf17"], "trainer.precision: got bf17; did you mean 'bf16'"),
        (["--trainer.max_epochs", "x"], "trainer.max_epochs must be a whole number; got x"),
        (["--trainer.strategy", "dpp"], "invalid strategy name"),
        (["--trainer.sync_batchnorm", "true"], "needs GPUs"),
        (["--trainer.strategy", "fsdp", "--model.ema", "0.9"], "ema keeps a whole copy"),
        (
            ["--trainer.strategy", "fsdp", "--model.channels_last", "true"],
            "channels_last stores weights",
        ),
        (["--model.channels_last", "yess"], "model.channels_last must be true or false; got yess"),
        (["--model.options", "3"], "model.options must be a dictionary; got 3"),
        (["--model.weights", "nowhere.pt"], "there is no file 'nowhere.pt'"),
        (["--model.freeze", "blokcs"], "'blokcs' names no parameter"),
        (["--model.loss", "bec"], "'bce'"),
        (["--model.unfreeze_epoch", "1"], "no effect without freeze"),
        (["--data.root", "nowhere"], "nowhere"),
        (["--data.augment", "lihgt"], "light"),
        (["--ckpt_path", "best"], "damaged"),
        (["--ckpt_path", "last", "--out", "elsewhere"], "no checkpoint"),
        (["--ckpt_path", "missing.ckpt"], "missing.ckpt does not exist"),
        (["--out", "/dev/null/run"], "--out"),
        (["--config", "nothing.yaml"], "nothing.yaml"),
    ],
)
def test_mistakes_get_one_line(wrong, named, shapes, tmp_path, capsys):
    earlier = tmp_path / "run" / "checkpoints" / "best.ckpt"
    earlier.parent.mkdir(parents=True)
    earlier.touch()
    assert named in refusal(["fit", *keys(shapes, tmp_path / "run"), *wrong], capsys)
    assert list(tmp_path.rglob("*.ckpt")) == [earlier]  # neither a new one nor moved aside


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ("model: {nam: x}", "'model.name'"),
        ("modle: {name: x}", "'model.name'"),
        ("trainr: {max_epochs: 1}", "'trainer.max_epochs'"),
        ("model: {name: x", "pars"),
    ],
)
def test_mistakes_in_a_config_get_one_line(config, named, tmp_path, capsys):
    path = tmp_path / "config.yaml"
    path.write_text(config)
    assert named in refusal(["fit", "--config", str(path)], capsys)


def test_an_unknown_key_gets_the_nearest_ones():
    known = ["model.lr", "model.name", "name"]
    message = explain_parser_error("unrecognized arguments: --model.nme", known)
    assert message.startswith("unknown key 'model.nme'; did you mean 'model.name'")
    assert message.endswith("known: model.lr, model.name, name")


def test_checkpoints_of_others_are_refused(run, shapes, tmp_path, capsys):
    damaged, foreign = tmp_path / "damaged.ckpt", tmp_path / "foreign.ckpt"
    damaged.write_bytes((run / "checkpoints" / "best.ckpt").read_bytes()[:5000])
    torch.save({"state_dict": {}, "epoch": 3}, foreign)
    for path, word in ((damaged, "damaged"), (foreign, "another project")):
        with pytest.raises(ValueError, match=word):
            load_classifier(path)
        assert word in refusal(
            ["fit", *keys(shapes, tmp_path / "run"), "--ckpt_path", str(path)], capsys
        )
    best = str(run / "checkpoints" / "best.ckpt")
    deeper = keys(
        shapes, tmp_path / "run", model__options='{"dim": 16, "depth": 3, "num_heads": 2}'
    )
    assert "another model" in refusal(["fit", *deeper, "--ckpt_path", best], capsys)
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        load_classifier(tmp_path)


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"model__freeze": "blocks.0"}, "freeze"),
        ({"model__layer_decay": 0.5}, "layer_decay"),
        ({"model__optimizer": "sgd"}, "optimizer 'adamw', not 'sgd'"),
    ],
)
def test_an_optimizer_that_does_not_fit_the_checkpoint_is_refused(
    changed, named, run, shapes, tmp_path, capsys
):
    last = str(run / "checkpoints" / "last.ckpt")
    assert named in refusal(
        ["fit", *keys(shapes, tmp_path / "run", **changed), "--ckpt_path", last], capsys
    )


def test_other_classes_are_refused(run, tmp_path, capsys):
    root = draw_folder(tmp_path / "renamed")
    for split in ("train", "val"):
        (root / split / "disc").rename(root / split / "coin")
    said = refusal(["validate", *keys(root, run)], capsys)
    assert "coin" in said
    assert "disc" in said


def test_a_damaged_last_checkpoint_falls_back_to_the_best(run, shapes, tmp_path, capsys):
    folder = tmp_path / "run" / "checkpoints"
    folder.mkdir(parents=True)
    (folder / "best.ckpt").write_bytes((run / "checkpoints" / "best.ckpt").read_bytes())
    (folder / "last.ckpt").write_bytes(b"cut off")
    cli.main(["fit", *keys(shapes, tmp_path / "run"), "--ckpt_path", "last"])
    said = capsys.readouterr().out
    assert "last.ckpt is damaged" in said
    assert "using" in said
    assert find_checkpoint(tmp_path / "run", "last").name == "last.ckpt"


def test_a_loss_that_is_no_number_stops_and_keeps_the_last_good_checkpoint(
    shapes, tmp_path, capsys
):
    out = tmp_path / "run"
    cli.main(["fit", *keys(shapes, out, trainer__max_epochs=1)])
    before = weights(out / "checkpoints" / "last.ckpt")
    capsys.readouterr()
    hot = keys(
        shapes,
        out,
        trainer__max_epochs=3,
        model__lr=1e30,
        checkpoint_steps=1,
        model__warmup_epochs=0,
    )
    said = refusal(["fit", *hot, "--ckpt_path", "last"], capsys, code=1)
    assert "step" in said
    kept = weights(out / "checkpoints" / "last.ckpt")
    assert all(torch.isfinite(value).all() for value in kept.values())
    assert before.keys() == kept.keys()
