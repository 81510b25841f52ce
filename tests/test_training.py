"""Training without a run: the recipe's arithmetic, the module's steps, maps of any network."""

import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from torch.nn.functional import cross_entropy
from training_cases import TINY

from visattn.models.presets import create_model
from visattn.models.weights import last_layer
from visattn.training.module import ImageClassifier
from visattn.training.optimizer import planned_steps
from visattn.training.parser import image_classifier, parse
from visattn.training.recipe import Recipe
from visattn.training.reports.attention_overlays import explain_batch
from visattn.training.sharded_parameters import repeated_blocks

CONFIGS = Path(__file__).parent.parent / "configs"


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
    known = {
        "limit_train_batches": 1.0,
        "accumulate_grad_batches": 1,
        "max_epochs": 1,
        "max_steps": -1,
    }
    return SimpleNamespace(
        datamodule=SimpleNamespace(train_dataloader=lambda: range(batches)), **known | changed
    )


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
    decayed = {
        id(p) for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]
    }
    for name, parameter in module.model.named_parameters():
        wanted = parameter.ndim > 1 and not name.endswith(("cls_token", "pos_embed"))
        assert (id(parameter) in decayed) == wanted, name
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(
        list(module.model.parameters())
    )


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
    for _ in range(60):
        optimizer.zero_grad()
        module.training_step(batch, 0).backward()
        optimizer.step()
    assert module.training_step(batch, 0) < 0.05


def test_flat_keys_reach_the_network():
    module = image_classifier(
        "vit_nano", 3, 16, similarity="cosine", options={"depth": 1}, lr=0.5, mixup=0.3
    )
    assert module.network["options"] == {"depth": 1, "similarity": "cosine"}
    assert (module.recipe.lr, module.recipe.mixup) == (0.5, 0.3)
    assert len(module.model.blocks) == 1


def test_switches_leave_the_names_of_the_weights():
    plain = image_classifier("resnet8", 3, 16)
    switched = image_classifier("resnet8", 3, 16, compile=True, channels_last=True)
    assert list(plain.state_dict()) == list(switched.state_dict())
    assert switched.model.conv1.weight.is_contiguous(memory_format=torch.channels_last)


def test_a_compiled_network_learns_the_same(monkeypatch):
    torch.compiler.reset()
    compile_module, calls = torch.nn.Module.compile, []

    def without_code(
        module, *args, **options
    ):  # the compiler's own code generation would take a minute
        calls.append(type(module).__name__)
        compile_module(module, backend="aot_eager")

    monkeypatch.setattr(torch.nn.Module, "compile", without_code)
    losses = []
    for compiled in (False, True):
        torch.manual_seed(0)
        module = image_classifier("resnet8", 3, 16, compile=compiled, label_smoothing=0.0)
        module.log = lambda *args, **options: None
        torch.manual_seed(1)
        batch = torch.rand(4, 3, 16, 16), torch.tensor([0, 1, 2, 1])
        loss = module.training_step(batch, 0)
        loss.backward()
        losses.append((loss.detach(), module.model.conv1.weight.grad))
    assert calls == ["ResNet"]
    torch.testing.assert_close(losses[0], losses[1])
    torch.compiler.reset()


def test_a_block_can_be_inserted():
    plain, more = (image_classifier("resnet8", 3, 16, insert=block) for block in (None, "se"))
    assert set(plain.model.state_dict()) < set(more.model.state_dict())


@pytest.mark.parametrize("config", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_configs_are_flat_known_and_buildable(config, tmp_path):
    text = config.read_text()
    header = [line for line in text.splitlines() if line.startswith("#")]
    assert any("uv run" in line and f"configs/{config.name}" in line for line in header)
    assert "class_path" not in text
    settings = yaml.safe_load(text)
    settings.pop("blocks", None)  # which only `visattn compare` knows
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
    command, parsed = parse(["fit", "--config", str(tmp_path / "config.yaml")])
    assert command == "fit"
    model = parsed.model.as_dict() | {"pretrained": False, "compile": False, "num_classes": 3}
    side = model["image_size"]
    assert image_classifier(**model).eval()(torch.rand(1, 3, side, side)).shape == (1, 3)


@pytest.mark.parametrize(
    ("name", "options", "method"),
    [
        ("vit_nano", TINY["options"], "rollout"),
        ("resnet8", {"block": "cbam"}, "spatial"),
        (
            "resnet8",
            {"block": "scsa"},
            "spatial",
        ),  # its tokens are channels, those of external are a memory's slots
        ("resnet8", {"block": "external"}, "gradcam"),
        ("resnet8", {}, "gradcam"),
    ],
)
def test_attention_of_any_network_can_be_drawn(name, options, method):
    torch.manual_seed(0)
    model = create_model(name, num_classes=3, image_size=24, **options).eval()
    with torch.inference_mode():
        images = torch.rand(2, 3, 24, 24)
        scores, heat, _ = explain_batch(model, images)
        assert torch.allclose(scores, model(images), atol=1e-5)
    assert heat.values.shape[0] == 2
    assert heat.values.std() > 0
    assert method in heat.method
    assert not any(parameter.grad is not None for parameter in model.parameters())


def test_a_map_of_zeros_is_looked_at_all_the_same():
    model = create_model("resnet8", num_classes=3).eval()
    torch.nn.init.zeros_(last_layer(model)[1].weight)  # no pixel speaks for a class
    heat = explain_batch(model, torch.rand(2, 3, 24, 24)).heat
    assert heat.values.shape[0] == 2 and not heat.values.any()


def test_mixed_images_are_compared_with_mixed_labels():
    module, logged = ImageClassifier(TINY, recipe=Recipe(mixup=0.4, label_smoothing=0.2)), {}
    module.log = lambda name, value, **options: logged.update({name: value})
    images, targets = torch.rand(2, 3, 16, 16), torch.tensor([[0.3, 0.7, 0], [0, 0.5, 0.5]])
    module.mix.forward = lambda *batch: (images, targets)
    module.training_step((images, torch.tensor([1, 2])), 0)
    assert set(logged) == {
        "train_loss",
        "train_plain_loss",
    }  # no class is the right one of a mixed image
    torch.testing.assert_close(
        logged["train_plain_loss"], cross_entropy(module(images), targets).detach()
    )


def test_weights_of_classes_follow_the_precision():
    scores, weights = torch.randn(4, 3, dtype=torch.bfloat16), torch.tensor([1.0, 2.0, 3.0])
    for loss in ("cross_entropy", "bce"):
        found = Recipe(loss=loss).objective(scores, torch.tensor([0, 1, 2, 0]), weights)
        expected = Recipe(loss=loss).objective(scores.float(), torch.tensor([0, 1, 2, 0]), weights)
        torch.testing.assert_close(found.float(), expected, rtol=0.02, atol=0)


@pytest.mark.parametrize("views", [1, 2])
def test_a_process_without_batches_passes_images_on_for_the_others(views, monkeypatch):
    others, told = iter([True, True, True, False]), []  # they have three batches, this one has one
    monkeypatch.setattr(
        "visattn.training.module.any_has_batch",
        lambda here, device: told.append(here) or next(others),
    )
    module = ImageClassifier(TINY, recipe=Recipe(views="flip" if views == 2 else "none")).eval()
    module._trainer, module.sharded, sizes = (
        SimpleNamespace(datamodule=SimpleNamespace(image_size=(16, 16))),
        True,
        [],
    )
    module.model.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    with torch.no_grad():
        module.validation_step((torch.rand(5, 3, 16, 16), torch.tensor([0, 1, 2, 0, 1])), 0)
        module._join_remaining_batches()
    assert sizes == views * [5] + 2 * views * [1] and told == [True, False, False, False]
    assert module.confusion.compute().sum() == 5


def test_steps_draw_from_their_own_seed():
    module = ImageClassifier(TINY, seed=3)
    draws = []
    for batch_idx in (4, 5, 4):
        module.on_train_batch_start(None, batch_idx)
        draws.append(torch.rand(3))
    assert torch.equal(draws[0], draws[2])
    assert not torch.equal(draws[0], draws[1])
    assert math.isfinite(float(draws[0].sum()))


@pytest.mark.parametrize(
    ("name", "options", "kinds"),
    [
        ("vit_nano", {}, {"ViTBlock"}),
        ("resnet50", {"block": "se"}, {"BottleneckUnit"}),
        ("resnet8", {}, {"BasicUnit"}),
        ("timm:vit_tiny_patch16_224", {}, {"Block"}),
        ("timm:convnext_atto", {}, {"ConvNeXtBlock"}),
        ("timm:swin_tiny_patch4_window7_224", {}, {"SwinTransformerBlock"}),
    ],
)
def test_sharding_takes_a_network_block_by_block(name, options, kinds):
    with torch.device("meta"):
        model = create_model(name, num_classes=3, **options)
    assert {kind.__name__ for kind in repeated_blocks(model)} == kinds
