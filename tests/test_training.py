"""Training: the recipe, the run folder, resuming, refusals, and what is left of a run that was stopped."""

import csv
import json
import math
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from torch.nn.functional import cross_entropy

from visattn.models.table import create_model
from visattn.training import cli
from visattn.training.attention import look
from visattn.training.checkpoint import KEY, find_checkpoint, read_checkpoint
from visattn.training.classifier import load
from visattn.training.keys import image_classifier, nearest
from visattn.training.module import ImageClassifier, Recipe, planned_steps
from visattn.training.run import claim

TINY = {"name": "vit_nano", "num_classes": 3, "image_size": 16, "options": {"dim": 16, "depth": 2, "num_heads": 2}}
CONFIGS = Path(__file__).parent.parent / "configs"
SHAPES = {"bar": "rectangle", "disc": "ellipse", "line": "line"}


def draw_folder(root: Path, train: int = 13, val: int = 7) -> Path:
    """Three classes of drawn shapes, as class folders under train/ and val/."""
    generator = np.random.default_rng(0)
    for split, count in (("train", train), ("val", val)):
        for name, shape in SHAPES.items():
            folder = root / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                image = Image.new("RGB", (19, 17), "white")
                x, y = generator.integers(0, 8, 2).tolist()
                getattr(ImageDraw.Draw(image), shape)((x, y, x + 8, y + 7), fill="black")
                image.save(folder / f"{number:02}.png")
    return root


@pytest.fixture(scope="module")
def shapes(tmp_path_factory) -> Path:
    return draw_folder(tmp_path_factory.mktemp("shapes"))


def keys(root: Path, out: Path, **changed) -> list[str]:
    """The flat keys of a run of seconds, as a command line."""
    chosen = {
        "out": out,
        "overlays": 0,
        "model.name": "vit_nano",
        "model.image_size": 16,
        "model.options": '{"dim": 16, "depth": 2, "num_heads": 2, "drop_path": 0.2}',
        "model.mixup": 0.2,
        "data.root": root,
        "data.batch_size": 5,
        "data.num_workers": 0,
        "trainer.max_epochs": 2,
        "trainer.accelerator": "cpu",
        "trainer.devices": 1,
        "trainer.enable_progress_bar": "false",
    }
    chosen |= {key.replace("__", "."): value for key, value in changed.items()}
    return [part for key, value in chosen.items() if value is not None for part in (f"--{key}", str(value))]


@pytest.fixture(scope="module")
def run(shapes, tmp_path_factory) -> Path:
    """A finished run of two epochs of seven steps, with a checkpoint every three steps."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    cli.main(["fit", *keys(shapes, out, checkpoint_steps=3, overlays=2)])
    return out


def weights(path: Path) -> dict:
    return read_checkpoint(path)["state_dict"]


def same(first: dict, second: dict) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


# The recipe.


def test_rate_warms_up_then_falls_to_zero():
    rates = [Recipe().rate(step, steps=23, warmup=5) for step in range(23)]
    assert rates[:5] == [pytest.approx((step + 1) / 6) for step in range(5)]
    assert rates[5] == 1
    assert rates[14] == pytest.approx(0.5)
    assert rates[5:] == sorted(rates[5:], reverse=True)
    assert 0 < rates[-1] < 0.02
    assert Recipe().rate(23, steps=23, warmup=5) == 0


def trainer_of(batches: int, **changed) -> SimpleNamespace:
    """What planned_steps asks a trainer."""
    known = {"limit_train_batches": 1.0, "accumulate_grad_batches": 1, "max_epochs": 1, "max_steps": -1}
    return SimpleNamespace(datamodule=SimpleNamespace(train_dataloader=lambda: range(batches)), **known | changed)


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"max_epochs": 3}, (11, 33)),
        ({"max_epochs": 3, "accumulate_grad_batches": 2}, (6, 18)),
        ({"max_epochs": 3, "limit_train_batches": 5}, (5, 15)),
        ({"max_epochs": 3, "limit_train_batches": 0.5}, (5, 15)),
        ({"max_epochs": 3, "max_steps": 7}, (11, 7)),
        ({"max_epochs": -1, "max_steps": 70}, (11, 70)),
    ],
)
def test_planned_steps(changed, expected):
    assert planned_steps(trainer_of(11, **changed)) == expected


def test_endless_training_is_refused():
    with pytest.raises(ValueError, match="give trainer"):
        planned_steps(trainer_of(11, max_epochs=-1))


def test_norms_and_biases_are_not_decayed():
    module = ImageClassifier(TINY, recipe=Recipe(lr=0.01, weight_decay=0.3))
    module._trainer = trainer_of(batches=11)
    optimizer = module.configure_optimizers()["optimizer"]
    decayed = {id(p) for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]}
    for name, parameter in module.model.named_parameters():
        wanted = parameter.ndim > 1 and not name.endswith(("cls_token", "pos_embed"))
        assert (id(parameter) in decayed) == wanted, name
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(module.model.parameters()))


def test_mixing_keeps_the_sum_of_the_targets():
    torch.manual_seed(0)
    images, labels = torch.rand(7, 3, 11, 13), torch.tensor([0, 1, 2, 0, 1, 2, 1])
    for recipe in (Recipe(mixup=0.8), Recipe(cutmix=1.0), Recipe(mixup=0.8, cutmix=1.0)):
        mixed, targets = recipe.mix(3)(images, labels)
        assert targets.shape == (7, 3)
        assert torch.allclose(targets.sum(1), torch.ones(7))
        assert not torch.equal(mixed, images)
    assert Recipe().mix(3) is None


def test_loss_is_the_smoothed_cross_entropy():
    module = ImageClassifier(TINY, recipe=Recipe(label_smoothing=0.2))
    module.log = lambda *args, **options: None
    images, labels = torch.rand(5, 3, 16, 16), torch.tensor([0, 1, 2, 2, 1])
    module.eval()
    targets = torch.full((5, 3), 0.2 / 3)
    targets[range(5), labels] += 0.8
    expected = -(targets * module(images).log_softmax(1)).sum(1).mean()
    assert torch.allclose(module.training_step((images, labels), 0), expected)
    assert not torch.allclose(expected, cross_entropy(module(images), labels))


def test_eight_images_are_learned_by_heart():
    torch.manual_seed(0)
    module = ImageClassifier(TINY, recipe=Recipe(label_smoothing=0.0))
    module.log = lambda *args, **options: None
    batch = torch.rand(8, 3, 16, 16), torch.tensor([0, 1, 2, 0, 1, 2, 0, 1])
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.01)
    for step in range(60):
        optimizer.zero_grad()
        module.training_step(batch, step).backward()
        optimizer.step()
    assert module.training_step(batch, 0) < 0.05


def test_flat_keys_reach_the_network():
    module = image_classifier("vit_nano", 3, 16, similarity="cosine", options={"depth": 1}, lr=0.5, mixup=0.3)
    assert module.network["options"] == {"depth": 1, "similarity": "cosine"}
    assert (module.recipe.lr, module.recipe.mixup) == (0.5, 0.3)
    assert len(module.model.blocks) == 1


def test_switches_leave_the_names_of_the_weights():
    plain = image_classifier("resnet8", 3, 16)
    switched = image_classifier("resnet8", 3, 16, compile=True, channels_last=True)
    assert list(plain.state_dict()) == list(switched.state_dict())
    assert switched.model.conv1.weight.is_contiguous(memory_format=torch.channels_last)


def test_a_block_can_be_inserted():
    plain, more = (image_classifier("resnet8", 3, 16, insert=block) for block in (None, "se"))
    assert set(plain.model.state_dict()) < set(more.model.state_dict())


@pytest.mark.parametrize("config", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_configs_are_flat_known_and_buildable(config, tmp_path, monkeypatch):
    text = config.read_text()
    header = [line for line in text.splitlines() if line.startswith("#")]
    assert any("uv run" in line and f"configs/{config.name}" in line for line in header)
    assert "class_path" not in text
    parsed = []
    monkeypatch.setattr(cli.TrainingCLI, "instantiate_classes", lambda self: parsed.append(self.config.fit))
    monkeypatch.setattr(cli.TrainingCLI, "_run_subcommand", lambda self, name: None)
    cli.main(["fit", "--config", str(config), "--out", str(tmp_path)])
    model = parsed[0].model.as_dict() | {"pretrained": False, "num_classes": 3}
    side = model["image_size"]
    assert image_classifier(**model).eval()(torch.rand(1, 3, side, side)).shape == (1, 3)


@pytest.mark.parametrize(
    ("name", "options", "method"),
    [
        ("vit_nano", TINY["options"], "rollout"),
        ("resnet8", {"block": "cbam"}, "spatial"),
        ("resnet8", {"block": "scsa"}, "spatial"),  # its tokens are channels, those of external are a memory's slots
        ("resnet8", {"block": "external"}, "gradcam"),
        ("resnet8", {}, "gradcam"),
    ],
)
def test_attention_of_any_network_can_be_drawn(name, options, method):
    torch.manual_seed(0)
    model = create_model(name, num_classes=3, image_size=24, **options).eval()
    with torch.inference_mode():
        images = torch.rand(2, 3, 24, 24)
        scores, heat = look(model, images)
        assert torch.allclose(scores, model(images), atol=1e-5)
    assert heat.values.shape[0] == 2
    assert heat.values.std() > 0
    assert method in heat.method
    assert not any(parameter.grad is not None for parameter in model.parameters())


# The run folder.


def test_run_folder_is_complete(run, shapes):
    pictures = ("curves.png", "confusion.png", "attention/sample.png", "attention/step_0000014.png")
    for name in pictures:
        with Image.open(run / name) as picture:
            assert min(picture.size) > 100, name
    result = json.loads((run / "result.json").read_text())
    assert (result["steps"], result["epochs"], result["classes"]) == (14, 2, ["bar", "disc", "line"])
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
    "images", ["photo.jpg", np.zeros((5, 5, 3), np.uint8), [], [None]], ids=lambda images: type(images).__name__
)
def test_a_classifier_takes_pil_images_only(run, images):
    with pytest.raises(TypeError, match="PIL image"):
        load(run)(images)


def test_loaded_classifier_repeats_the_validation(run, shapes):
    classifier = load(run)
    assert not classifier.model.training
    files = sorted((shapes / "val").glob("*/*.png"))
    images = [Image.open(file) for file in files]
    probabilities = classifier(images)
    assert probabilities.shape == (21, 3)
    assert torch.allclose(probabilities.sum(1), torch.ones(21))
    assert torch.allclose(classifier(images[4]), probabilities[4], atol=1e-6)
    right = sum(
        classifier.classes[row.argmax()] == file.parent.name for row, file in zip(probabilities, files, strict=True)
    )
    assert right / 21 == pytest.approx(json.loads((run / "result.json").read_text())["val_accuracy"])
    assert torch.equal(load(run / "checkpoints" / "best.ckpt")(images), probabilities)


def test_validate_counts_every_image(run, shapes, capsys):
    cli.main(["validate", *keys(shapes, run)])
    wanted = json.loads((run / "result.json").read_text())["val_accuracy"]
    assert f"({round(wanted * 21)} of 21 images)" in capsys.readouterr().out


def test_predict_writes_a_line_per_file(run, shapes, capsys):
    cli.main(["predict", *keys(shapes, run, data__predict_root=shapes / "val" / "disc")])
    with (run / "predictions.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    classifier = load(run)
    assert len(rows) == 7
    for row in rows:
        probabilities = classifier(Image.open(shapes / "val" / "disc" / Path(row["file"]).name))
        assert row["class"] == classifier.classes[probabilities.argmax()]
        assert float(row["probability"]) == pytest.approx(float(probabilities.max()), abs=1e-5)
    assert "7 images" in capsys.readouterr().out


def test_an_earlier_run_steps_aside(tmp_path):
    folder = tmp_path / "run"
    assert claim(folder, resumed=False) == ""
    (folder / "checkpoints" / "last.ckpt").write_text("first")
    assert claim(folder, resumed=True) == ""
    assert "run.1" in claim(folder, resumed=False)
    assert (tmp_path / "run.1" / "checkpoints" / "last.ckpt").read_text() == "first"
    assert not any((folder / "checkpoints").iterdir())


# Resuming.


@pytest.mark.parametrize(("number", "step"), [(signal.SIGTERM, 9), (signal.SIGINT, 7)])
def test_a_stopped_run_goes_on_to_the_same_weights(number, step, run, shapes, tmp_path, capsys, monkeypatch):
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
    assert same(weights(tmp_path / "cut/checkpoints/last.ckpt"), weights(run / "checkpoints/last.ckpt"))


def test_training_without_progress_stops_early(shapes, tmp_path):
    options = '{"dim": 16, "depth": 2, "num_heads": 2, "stem": "patch"}'  # no batch norm, which moves without steps
    changed = {"patience": 2, "model__options": options, "model__lr": 0.0, "trainer__max_epochs": 9}
    cli.main(["fit", *keys(shapes, tmp_path / "run", **changed)])
    assert json.loads((tmp_path / "run" / "result.json").read_text())["epochs"] == 3


def test_a_moved_run_keeps_its_best_checkpoint(run, shapes, tmp_path):
    moved = tmp_path / "moved"
    shutil.copytree(run, moved)
    best = weights(moved / "checkpoints" / "best.ckpt")
    state = read_checkpoint(moved / "checkpoints" / "last.ckpt")
    for name, value in state["state_dict"].items():
        if name.startswith("model.head"):
            value.zero_()  # every class is as likely as any other: no better than chance from here on
    torch.save(state, moved / "checkpoints" / "last.ckpt")
    worse = keys(shapes, moved, trainer__max_epochs=3, model__lr=0.0)
    cli.main(["fit", *worse, "--ckpt_path", "last"])
    before, after = (json.loads((folder / "result.json").read_text()) for folder in (run, moved))
    assert after["last"]["val_accuracy"] < before["val_accuracy"] == after["val_accuracy"]
    assert same(weights(moved / "checkpoints" / "best.ckpt"), best)


def test_resuming_keeps_the_metrics(run, shapes, tmp_path):
    cli.main(["fit", *keys(shapes, tmp_path / "more", trainer__max_epochs=1)])
    cli.main(["fit", *keys(shapes, tmp_path / "more", trainer__max_epochs=3), "--ckpt_path", "last"])
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


# What goes wrong.


def refusal(arguments: list[str], capsys, code: int = 2) -> str:
    """Run a command that must fail; return the one line it says."""
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    said = capsys.readouterr().err.strip()
    assert stop.value.code == code
    assert len(said.splitlines()) == 1, said
    return said


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


def test_nearest_key():
    known = ["model.lr", "model.name", "name"]
    assert nearest("model.nme", known) == "; did you mean 'model.name'?"
    assert "known are model.lr, model.name, name" in nearest("zzzz", known)


def test_checkpoints_of_others_are_refused(run, shapes, tmp_path, capsys):
    damaged, foreign = tmp_path / "damaged.ckpt", tmp_path / "foreign.ckpt"
    damaged.write_bytes((run / "checkpoints" / "best.ckpt").read_bytes()[:5000])
    torch.save({"state_dict": {}, "epoch": 3}, foreign)
    for path, word in ((damaged, "damaged"), (foreign, "another project")):
        with pytest.raises(ValueError, match=word):
            load(path)
        assert word in refusal(["fit", *keys(shapes, tmp_path / "run"), "--ckpt_path", str(path)], capsys)
    best = str(run / "checkpoints" / "best.ckpt")
    deeper = keys(shapes, tmp_path / "run", model__options='{"dim": 16, "depth": 3, "num_heads": 2}')
    assert "another model" in refusal(["fit", *deeper, "--ckpt_path", best], capsys)
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        load(tmp_path)


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


def test_a_loss_that_is_no_number_stops_and_keeps_the_last_good_checkpoint(shapes, tmp_path, capsys):
    out = tmp_path / "run"
    cli.main(["fit", *keys(shapes, out, trainer__max_epochs=1)])
    before = weights(out / "checkpoints" / "last.ckpt")
    capsys.readouterr()
    hot = keys(shapes, out, trainer__max_epochs=3, model__lr=1e30, checkpoint_steps=1, model__warmup_epochs=0)
    said = refusal(["fit", *hot, "--ckpt_path", "last"], capsys, code=1)
    assert "step" in said
    kept = weights(out / "checkpoints" / "last.ckpt")
    assert all(torch.isfinite(value).all() for value in kept.values())
    assert before.keys() == kept.keys()


def test_steps_draw_from_their_own_seed():
    module = ImageClassifier(TINY, seed=3)
    draws = []
    for batch_idx in (4, 5, 4):
        module.on_train_batch_start(None, batch_idx)
        draws.append(torch.rand(3))
    assert torch.equal(draws[0], draws[2])
    assert not torch.equal(draws[0], draws[1])
    assert math.isfinite(float(draws[0].sum()))
