"""Fine-tuning: weights from a file, frozen layers, layer-wise rates, losses, plain features."""

import re
import signal
from types import SimpleNamespace

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from timm.optim import list_optimizers
from training_cases import SMALL, TINY, keys, refusal, same, weights

from visattn.data.module import ImageData
from visattn.models.presets import create_model
from visattn.models.weights import last_layer
from visattn.training import cli
from visattn.training.callbacks.freezing import frozen_names
from visattn.training.checkpoint_io import read_checkpoint
from visattn.training.classifier import load_classifier
from visattn.training.module import ImageClassifier
from visattn.training.neighbors import features, neighbors_accuracy, vote
from visattn.training.network import build_network
from visattn.training.parser import image_classifier
from visattn.training.recipe import Recipe
from visattn.training.reports.predictions import PredictionWriter


def tiny(**options):
    return create_model("vit_nano", image_size=16, **{"num_classes": 3, **SMALL, **options})


# Weights from a file.


@pytest.mark.parametrize("form", ["safetensors", "pth", "wrapped"])
@pytest.mark.parametrize("name", ["vit_nano", "resnet8", "timm:test_resnet"])
def test_weights_from_a_file_but_for_the_head(name, form, tmp_path):
    options = SMALL if name == "vit_nano" else {}
    trained = create_model(name, num_classes=5, image_size=16, **options)
    state, file = (
        trained.state_dict(),
        tmp_path / f"weights.{'safetensors' if form == 'safetensors' else 'pth'}",
    )
    if form == "safetensors":
        save_file(state, file)
    else:
        torch.save({"state_dict": state} if form == "wrapped" else state, file)
    model = create_model(name, num_classes=3, image_size=16, weights=file, **options)
    head = last_layer(model)[0]
    for key, value in model.state_dict().items():
        if not key.startswith(head):
            assert torch.equal(value, state[key]), key
    assert last_layer(model)[1].out_features == 3
    again = create_model(name, num_classes=5, image_size=16, weights=file, **options)
    if (
        name != "timm:test_resnet"
    ):  # timm keeps a head only where its own weights have as many classes
        assert same(again.state_dict(), state)


def test_positions_of_weights_are_resized(tmp_path):
    torch.save(
        tiny(class_token=False, pool="mean", patch_size=4).state_dict(), tmp_path / "small.pt"
    )
    options = {
        "num_classes": 3,
        "image_size": 32,
        **SMALL,
        "class_token": False,
        "pool": "mean",
        "patch_size": 4,
    }
    assert create_model("vit_nano", weights=tmp_path / "small.pt", **options).pos_embed.shape == (
        1,
        64,
        16,
    )


def test_a_run_starts_from_an_earlier_one(run, shapes, tmp_path):
    best = run / "checkpoints" / "best.ckpt"
    cli.main(["fit", *keys(shapes, tmp_path / "next", model__weights=best, model__lr=0.0)])
    key = "model.blocks.0.mlp.fc1.weight"
    assert torch.equal(weights(tmp_path / "next/checkpoints/last.ckpt")[key], weights(best)[key])
    assert (
        read_checkpoint(tmp_path / "next/checkpoints/last.ckpt")["visattn"]["network"]["weights"]
        is None
    )
    assert load_classifier(tmp_path / "next").classes == [
        "bar",
        "disc",
        "line",
    ]  # without the file it started from


def test_weights_with_and_without_an_inserted_block(tmp_path):
    torch.manual_seed(0)
    sizes = {"num_classes": 3, "image_size": 16}
    for insert in (None, "se"):
        trained = build_network("resnet8", insert=insert, **sizes)
        torch.save(trained.state_dict(), tmp_path / "weights.pt")
        model = build_network("resnet8", insert="se", weights=str(tmp_path / "weights.pt"), **sizes)
        assert all(
            torch.equal(model.state_dict()[key], value)
            for key, value in trained.state_dict().items()
        )
    assert same(model.state_dict(), trained.state_dict())


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.pt", None, "there is no file"),
        ("damaged.pt", b"no weights at all", "damaged"),
        ("damaged.safetensors", b"no weights at all", "damaged"),
        ("list.pt", [1, 2], "damaged or holds no weights"),
        ("numbers.pt", {"epoch": 3}, "holds no weights"),
        ("deeper.pt", {"depth": 3}, "has a foreign 'blocks.2"),
        ("shallow.pt", {"depth": 1}, "has no 'blocks.1"),
        ("wider.pt", {"dim": 24}, "size mismatch"),
    ],
)
def test_weights_that_do_not_fit_are_refused(name, content, message, tmp_path):
    file = tmp_path / name
    if isinstance(content, bytes):
        file.write_bytes(content)
    elif content is not None:
        built = isinstance(content, dict) and not content.keys() & {"epoch"}
        torch.save(tiny(**content).state_dict() if built else content, file)
    with pytest.raises((ValueError, FileNotFoundError), match=re.escape(message)) as error:
        tiny(weights=file)
    assert name in str(error.value)


def test_weights_of_another_timm_model_are_refused(tmp_path):
    torch.save(timm.create_model("test_vit").state_dict(), tmp_path / "vit.pt")
    with pytest.raises(ValueError, match=r"vit.pt does not fit timm:test_resnet"):
        create_model("timm:test_resnet", weights=tmp_path / "vit.pt")


def test_pretrained_without_network_names_the_way_out():
    with pytest.raises(
        ValueError, match=r"timm:resnet10t: no pretrained weights .* pass a file as weights"
    ):
        create_model("timm:resnet10t", pretrained=True)  # the tests are cut off from the hub


# Freezing.


@pytest.mark.parametrize(
    ("patterns", "free"),
    [
        ("backbone", {"head"}),
        ("patch_embed", {"blocks", "cls_token", "head", "norm", "pos_embed"}),
        ("patch_embed.*, blocks.0.*,cls_token", {"blocks", "head", "norm", "pos_embed"}),
        ("blocks.[01]", {"patch_embed", "cls_token", "head", "norm", "pos_embed"}),
    ],
)
def test_patterns_name_what_is_frozen(patterns, free):
    names = {name for name, _ in tiny().named_parameters()}
    assert {name.split(".")[0] for name in names - frozen_names(tiny(), patterns)} == free


@pytest.mark.parametrize(
    ("patterns", "message"),
    [("blokcs", "names no parameter; the network's parts are blocks"), ("*", "nothing to learn")],
)
def test_patterns_that_freeze_nothing_or_all_are_refused(patterns, message):
    with pytest.raises(ValueError, match=message):
        frozen_names(tiny(), patterns)


@pytest.fixture
def watched(monkeypatch):
    """The state after every step of the runs of a test."""
    states, end = [], ImageClassifier.on_train_batch_end

    def remember(module, outputs, batch, batch_idx):
        states.append({key: value.clone() for key, value in module.model.state_dict().items()})
        return end(module, outputs, batch, batch_idx)

    monkeypatch.setattr(ImageClassifier, "on_train_batch_end", remember)
    return states


def changed(first: dict, last: dict) -> set[str]:
    return {key.split(".")[0] for key in first if not torch.equal(first[key], last[key])}


def test_a_linear_probe_moves_nothing_but_the_head(shapes, tmp_path, watched):
    cli.main(["fit", *keys(shapes, tmp_path / "run", model__freeze="backbone")])
    assert changed(watched[0], watched[-1]) == {"head"}  # batch statistics of the stem included
    states = read_checkpoint(tmp_path / "run" / "checkpoints" / "last.ckpt")["optimizer_states"][0][
        "state"
    ]
    assert len(states) == 2


def test_frozen_layers_learn_from_the_epoch_asked_for(shapes, tmp_path, watched):
    options = {"model__freeze": "blocks.0,patch_embed", "model__unfreeze_epoch": 1}
    cli.main(["fit", *keys(shapes, tmp_path / "run", **options)])
    assert "patch_embed" not in changed(watched[0], watched[6])
    assert all(
        torch.equal(watched[0][key], watched[6][key])
        for key in watched[0]
        if key.startswith("blocks.0")
    )
    assert "patch_embed" in changed(watched[7], watched[-1])
    assert any(
        not torch.equal(watched[7][key], watched[-1][key])
        for key in watched[0]
        if key.startswith("blocks.0")
    )


@pytest.mark.parametrize("step", [4, 9])
def test_a_run_with_frozen_layers_goes_on(step, shapes, tmp_path, at_step):
    options = {"model__freeze": "blocks.0,patch_embed", "model__unfreeze_epoch": 1}
    cli.main(["fit", *keys(shapes, tmp_path / "whole", **options)])
    at_step(step, lambda: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(SystemExit):
        cli.main(["fit", *keys(shapes, tmp_path / "cut", **options)])
    cli.main(["fit", *keys(shapes, tmp_path / "cut", **options), "--ckpt_path", "last"])
    whole, cut = (
        weights(tmp_path / name / "checkpoints" / "last.ckpt") for name in ("whole", "cut")
    )
    assert same(whole, cut)


def test_layer_decay_slows_early_layers():
    module = ImageClassifier(TINY, recipe=Recipe(lr=0.01, layer_decay=0.5))
    trainer = pytest.MonkeyPatch()
    trainer.setattr("visattn.training.module.planned_steps", lambda _: (7, 14))
    module._trainer = object()
    optimizer = module.configure_optimizers()["optimizer"]
    trainer.undo()
    rates = {
        id(p): group["initial_lr"] for group in optimizer.param_groups for p in group["params"]
    }
    named = dict(module.model.named_parameters())
    by_layer = [
        rates[id(named[name])]
        for name in ("cls_token", "blocks.0.norm1.bias", "blocks.1.norm1.bias", "head.bias")
    ]
    assert by_layer == pytest.approx([0.01 * 0.5**n for n in (3, 2, 1, 0)])


@pytest.mark.parametrize("optimizer", ["sgd", "muon", "lamb", "adafactor", "lion"])
def test_optimizers_of_timm(optimizer, shapes, tmp_path):
    assert optimizer in list_optimizers()
    cli.main(
        ["fit", *keys(shapes, tmp_path / "run", model__optimizer=optimizer, trainer__max_epochs=1)]
    )
    assert read_checkpoint(tmp_path / "run" / "checkpoints" / "last.ckpt")["global_step"] == 7


# Losses, sizes and views.


def test_bce_judges_each_class_alone():
    recipe, scores = Recipe(loss="bce", label_smoothing=0.3), torch.randn(5, 3)
    labels = torch.tensor([0, 1, 2, 2, 1])
    targets = torch.full((5, 3), 0.1)
    targets[range(5), labels] += 0.7
    p = scores.sigmoid()
    by_hand = -(targets * p.log() + (1 - targets) * (1 - p).log())
    torch.testing.assert_close(recipe.objective(scores, labels), by_hand.mean())
    weights = torch.tensor([1.0, 2.0, 3.0])
    torch.testing.assert_close(
        recipe.objective(scores, labels, weights), (by_hand * weights).mean()
    )
    assert recipe.plain_loss(scores, labels) != recipe.objective(scores, labels)
    assert torch.equal(recipe.probabilities(scores), p)


def test_class_weights_come_from_the_counts(shapes, tmp_path, monkeypatch):
    for split in ("train", "val"):
        for name, count in (("many", 12), ("few", 4)):
            for number in range(count):
                path = tmp_path / "data" / split / name / f"{number}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.new("RGB", (16, 16), "white" if name == "few" else "black").save(path)
    seen, objective = [], Recipe.objective

    def spy(self, scores, targets, weights=None):
        seen.append(weights)
        return objective(self, scores, targets, weights)

    monkeypatch.setattr(Recipe, "objective", spy)
    balanced = keys(
        tmp_path / "data", tmp_path / "run", model__class_weights="balanced", trainer__max_epochs=1
    )
    cli.main(["fit", *balanced])
    assert seen[0][0] == pytest.approx(3 * seen[0][1])  # few comes before many
    assert float((seen[0] * torch.tensor([4.0, 12.0])).sum()) == pytest.approx(16)


def test_images_of_several_labels(tmp_path, capsys):
    root, generator = tmp_path / "data", torch.Generator().manual_seed(0)
    rows = ["file,labels,split"]
    for number in range(24):
        red, blue = torch.rand(2, generator=generator) > 0.4
        root.mkdir(exist_ok=True)
        Image.new("RGB", (16, 16), (255 * int(red), 0, 255 * int(blue))).save(
            root / f"{number}.png"
        )
        names = ";".join(name for name, is_in in (("blue", blue), ("red", red)) if is_in)
        rows.append(f"{number}.png,{names},{'val' if number > 15 else 'train'}")
    (root / "labels.csv").write_text("\n".join(rows))
    several = {
        "data__labels": "labels.csv",
        "model__mixup": 0,
        "trainer__max_epochs": 30,
        "model__lr": 0.01,
    }
    several |= {"model__name": "resnet8", "model__options": "{}"}
    assert "loss='bce'" in refusal(["fit", *keys(root, tmp_path / "run", **several)], capsys)
    cli.main(["fit", *keys(root, tmp_path / "run", model__loss="bce", **several)])
    said = capsys.readouterr().out
    assert "validation map" in said
    classifier = load_classifier(tmp_path / "run")
    both = classifier(Image.new("RGB", (16, 16), (255, 0, 255)))
    assert classifier.multilabel
    assert both.min() > 0.5  # two classes at once


def test_training_images_grow():
    recipe = Recipe(start_size=32)
    assert [recipe.side(64, epoch, 9) for epoch in range(9)] == [32, 40, 40, 48, 56, 56, 64, 64, 64]
    module = ImageClassifier(TINY, recipe=Recipe(start_size=8))
    sizes = []
    module.model.register_forward_pre_hook(
        lambda _, inputs: sizes.append(tuple(inputs[0].shape[-2:]))
    )
    module.log, module.epochs = lambda *args, **options: None, 10
    module.training_step((torch.rand(2, 3, 16, 16), torch.tensor([0, 2])), 0)
    module.eval().validation_step((torch.rand(2, 3, 16, 16), torch.tensor([0, 2])), 0)
    assert sizes == [(8, 8), (16, 16)]


def test_a_network_of_one_size_cannot_grow():
    network = {"name": "timm:vit_tiny_patch16_224", "num_classes": 3, "image_size": 32}
    with pytest.raises(
        ValueError, match="start_size: VisionTransformer is built for one image size"
    ):
        ImageClassifier(network, recipe=Recipe(start_size=16))


def test_mirrored_views_are_averaged():
    module = ImageClassifier(TINY, recipe=Recipe(views="flip")).eval()
    images = torch.rand(4, 3, 16, 16)
    names, answers = module.predict_step((images, list("abcd")), 0)
    expected = (module.model(images) + module.model(images.flip(3))) / 2
    torch.testing.assert_close(answers, expected.softmax(1))
    _, mirrored = module.predict_step((images.flip(3), names), 0)
    torch.testing.assert_close(answers, mirrored)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"loss": "bec"}, "loss: there is no 'bec'; did you mean 'bce'?"),
        ({"class_weights": "balancd"}, "did you mean 'balanced'?"),
        ({"views": "flp"}, "did you mean 'flip'?"),
        ({"layer_decay": 0}, "layer_decay must lie in (0, 1], got 0"),
        ({"layer_decay": 1.5}, "layer_decay must lie in (0, 1], got 1.5"),
        ({"unfreeze_epoch": 2}, "unfreeze_epoch=2 has no effect without freeze"),
        ({"start_size": -8}, "start_size must be 0 or more, got -8"),
    ],
)
def test_recipes_that_cannot_be(wrong, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Recipe(**wrong)


def test_a_network_without_layers_refuses_their_decay():
    with pytest.raises(ValueError, match="layer_decay needs a network that names its layers"):
        image_classifier("resnet8", 3, 16, layer_decay=0.5)


# Features without training.


def test_votes_of_neighbors_by_hand():
    train = torch.tensor([[1.0, 0], [0.8, 0.6], [0, 1.0], [0, -1.0]]), torch.tensor([0, 1, 2, 2])
    test = torch.tensor([[0.6, 0.8]])
    votes = vote(train, test, 3, 3)
    expected = [torch.tensor(cos / 0.07).exp() for cos in (0.6, 0.8 * 0.6 + 0.6 * 0.8, 0.8)]
    torch.testing.assert_close(votes[0], torch.stack(expected))


def test_neighbors_of_a_run(run, shapes, capsys):
    cli.main(["validate", *keys(shapes, run), "--knn", "1"])
    said = float(re.search(r"accuracy of 1 nearest neighbors (\S+) %", capsys.readouterr().out)[1])
    data = ImageData(str(shapes), image_size=16, batch_size=4, num_workers=0)
    data.setup()
    model, device = load_classifier(run).model, torch.device("cpu")
    train, labels = features(model, data.ordered_dataloader("train"), device)
    test, truth = features(model, data.ordered_dataloader("val"), device)
    assert train.shape == (39, 16)
    by_hand = (labels[torch.cdist(test, train).argmin(1)] == truth).float().mean()
    assert said == pytest.approx(100 * float(by_hand), abs=0.01)
    assert neighbors_accuracy(model, data, 1, device) == pytest.approx(float(by_hand))


def test_neighbors_need_one_label_per_image():
    with pytest.raises(ValueError, match=r"knn .* needs one label per image, not several"):
        neighbors_accuracy(None, SimpleNamespace(multilabel=True), 1, torch.device("cpu"))


def test_predictions_make_their_folder_and_keep_names_that_are_no_text(tmp_path):
    writer, trainer = (
        PredictionWriter(tmp_path / "new" / "folder"),
        SimpleNamespace(global_rank=0, world_size=1),
    )
    writer.classes = ["a", "b"]
    writer.on_predict_start(trainer, None)
    answer = ["gr\udcfc\udcdfe.png"], torch.tensor([[0.25, 0.75]])
    writer.write_on_batch_end(trainer, None, answer, None, None, 0, 0)
    writer.teardown(trainer, None, "predict")
    assert (
        b"gr\xfc\xdfe.png,b,0.750000"
        in (tmp_path / "new" / "folder" / "predictions.csv").read_bytes()
    )
