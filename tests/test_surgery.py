"""insert, remove, replace: nothing renamed, nothing changed at the start, nothing left behind."""

import copy
import io
import pickle
from collections import Counter

import pytest
import timm
import torch
import torchvision
from model_cases import NARROW_BLOCK_OPTIONS
from surgery_cases import (
    TINY,
    count_hooks,
    fade_in,
    image,
    inserted_blocks,
    inserted_names,
    takes_many,
    tiny,
)
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel
from torchvision.models.convnext import CNBlockConfig

from visattn.blocks.catalog import BLOCKS
from visattn.models.cnn import ResNet
from visattn.surgery import insert, remove, replace


class Plain(nn.Module):
    """Runs its own children by name, as many stages of others do."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, 2, 1)
        self.body = Children(
            nn.Conv2d(6, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 6, 3, padding=1)
        )
        self.head = nn.Linear(6, 4)

    def forward(self, x):
        return self.head(self.body(self.stem(x)).mean((2, 3)))


class Children(nn.Module):
    """Its forward runs whatever children it has."""

    def __init__(self, *parts):
        super().__init__()
        for i, part in enumerate(parts):
            self.add_module(f"part{i}", part)

    def forward(self, x):
        for part in self.children():
            x = part(x)
        return x


# Where


def small_vgg():
    with torch.device("meta"):
        model = torchvision.models.vgg11()
    model.features = torchvision.models.vgg.make_layers([8, "M", 16, 16, "M"])
    model.classifier = nn.Linear(16 * 7 * 7, 5)
    return model


def small_resnext():
    bottleneck = torchvision.models.resnet.Bottleneck
    return torchvision.models.ResNet(bottleneck, [1, 1, 1, 1], groups=8, width_per_group=4)


def small_convnext():
    return torchvision.models.ConvNeXt([CNBlockConfig(8, 16, 2), CNBlockConfig(16, None, 1)])


def small_timm_densenet():
    return timm.models.densenet.DenseNet(growth_rate=8, block_config=(1, 2, 1))


def small_timm_vgg():
    return timm.models.vgg.VGG([8, "M", 16, "M", 16, "M", 16, "M", 16, "M"])


NETWORKS = {  # name: (build, number of stages, number of blocks)
    "tv-resnet18": (torchvision.models.resnet18, 4, 8),
    "tv-resnext": (small_resnext, 4, 4),
    "tv-convnext": (small_convnext, 2, 3),
    "tv-efficientnet": (torchvision.models.efficientnet_b0, 5, 16),
    "tv-mobilenet": (torchvision.models.mobilenet_v3_small, 4, 11),
    "tv-regnet": (torchvision.models.regnet_y_400mf, 4, 16),
    "tv-densenet": (lambda: torchvision.models.DenseNet(8, (1, 2, 1), 16), 3, 3),
    "tv-vgg": (small_vgg, 2, 2),
    "timm-resnet10t": (lambda: timm.create_model("resnet10t"), 4, 4),
    "timm-convnext": (lambda: timm.create_model("convnext_atto", depths=(1, 1, 2, 1)), 4, 5),
    "timm-efficientnet": (lambda: timm.create_model("efficientnet_lite0"), 5, 16),
    "timm-mobilenet": (lambda: timm.create_model("mobilenetv3_small_050"), 4, 11),
    "timm-regnet": (lambda: timm.create_model("regnety_002"), 4, 13),
    "timm-densenet": (small_timm_densenet, 3, 3),
    "timm-vgg": (small_timm_vgg, 5, 5),
    "own": (tiny, 2, 3),
}


@pytest.mark.parametrize("rule", ["stages", "blocks"])
@pytest.mark.parametrize("name", NETWORKS)
def test_everyones_networks(name, rule):
    build, stages, blocks = NETWORKS[name]
    model, x = build().eval(), image(1, 3, 64, 64)
    keys, modules, hooks = set(model.state_dict()), dict(model.named_modules()), count_hooks(model)
    with torch.no_grad():
        before = model(x)
        assert insert(model, "se", where=rule, reduction=4, example=(1, 3, 64, 64)) is model
        names = inserted_names(model)
        assert len(names) == (stages if rule == "stages" else blocks)
        assert keys < set(model.state_dict())
        assert all("inserted" in key for key in set(model.state_dict()) - keys)
        torch.testing.assert_close(model(x), before, rtol=0, atol=0)
        calls = count_calls(fade_in(model), x)
        assert calls == dict.fromkeys(names, 1)
        assert not torch.equal(model(x), before)
        assert remove(model) is model
        torch.testing.assert_close(model(x), before, rtol=0, atol=0)
    assert list(model.named_modules()) == list(modules.items()) and count_hooks(model) == hooks
    assert not model.training


def count_calls(model, x):
    """How often each inserted block runs, by name."""
    names = {module: name for name, module in model.named_modules()}
    counts = Counter()
    handles = []
    for block in inserted_blocks(model):
        count = lambda module, *_: counts.update([names[module]])  # noqa: E731
        handles.append(block.register_forward_hook(count))
    model(x)
    for handle in handles:
        handle.remove()
    return counts


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        ("layer[1-2].*", ["layer1.0", "layer2.0", "layer2.1"]),
        ("layer2", ["layer2"]),
        ("layer*.0.bn2", ["layer1.0.bn2", "layer2.0.bn2"]),
        ("after:BasicUnit", ["layer1.0", "layer2.0", "layer2.1"]),
        ("stages", ["layer1", "layer2"]),
        ("blocks", ["layer1.0", "layer2.0", "layer2.1"]),
    ],
)
def test_where(where, expected):
    assert inserted_names(insert(tiny(), "se", where=where)) == [
        f"{name}.inserted" for name in expected
    ]


def test_a_host_that_runs_its_children_runs_the_block_once():
    model = Plain().eval()
    before = model(image())
    insert(model, "se", where="body", example=(1, 3, 16, 16))
    assert torch.equal(model(image()), before)
    assert count_calls(model, image()) == {"body.inserted": 1}


def test_example_and_input_channels():
    with torch.no_grad():
        model = ResNet(TINY, 5, in_channels=1).eval()
        assert len(inserted_names(insert(model, "se"))) == 3
        fixed = nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 6 * 6, 3)
        ).eval()
        with pytest.raises(ValueError, match=r"dry run of Sequential .*\(1, 1, 96, 96\).*example="):
            insert(fixed, "se", where="1")
        x = torch.randn(2, 1, 8, 8)
        before = fixed(x)
        assert torch.equal(insert(fixed, "se", where="1", example=x)(x), before)
        assert inserted_names(fixed) == ["1.inserted"]


def test_dry_run_leaves_no_trace():
    model = tiny().train()
    model.bn1.eval()
    state = copy.deepcopy(model.state_dict())
    insert(model, "se", where="stages")
    assert (
        model.training
        and not model.bn1.training
        and all(part.training for part in model.layer1.inserted.modules())
    )
    for key, value in state.items():
        assert torch.equal(model.state_dict()[key], value)


# Identity


@pytest.mark.parametrize("block", [name for name in BLOCKS if not takes_many(name)])
def test_identity_then_everything_learns(block):
    silent = None
    for seed in range(5):  # a hidden unit may be dead under a single seed
        model, x = tiny(), image(4, 3, 13, 11)
        before = model(x)
        torch.manual_seed(seed)
        insert(model, block, where="layer2.0", **NARROW_BLOCK_OPTIONS.get(block, {}))
        assert torch.equal(model(x), before)
        names = without_gradient_at_second_step(model, model.layer2[0].inserted.train())
        silent = names if silent is None else silent & names
        if not silent:
            break
    assert not silent, f"no gradient at the second step: {sorted(silent)}"


def without_gradient_at_second_step(model, part):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(2):
        optimizer.zero_grad()
        model(image(4, 3, 13, 11, seed=step)).square().sum().backward()
        optimizer.step()
    return {
        name for name, p in part.named_parameters() if p.grad is None or not p.grad.abs().max() > 0
    }


def test_a_block_that_is_the_identity_gets_no_second_zero():
    for name in ("gct", "gc", "non_local", "pam"):
        if name in BLOCKS:
            assert insert(tiny(), name, where="layer2.0").layer2[0].inserted.gamma is None
    assert insert(tiny(), "se", where="layer2.0").layer2[0].inserted.gamma is not None


def test_without_identity_it_is_the_plain_block():
    model = tiny()
    unit = model.layer2[0]
    x = image(2, 8, 9, 7)
    before = unit(x)
    insert(model, "se", where="layer2.0", identity=False, reduction=4)
    torch.testing.assert_close(unit(x), unit.inserted.block(before))


# Journeys of an inserted model


def test_old_weights_load_with_only_the_blocks_missing():
    model = insert(tiny(), "se")
    missing, unexpected = model.load_state_dict(tiny().state_dict(), strict=False)
    assert not unexpected and missing and all(".inserted." in key for key in missing)


def test_copies_act_on_their_own():
    model = fade_in(insert(tiny(), "se"))
    x = image()
    expected = model(x)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for twin in (
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(buffer, weights_only=False),
        AveragedModel(model).module,
    ):
        assert torch.equal(twin(x), expected)
        with torch.no_grad():
            for block in inserted_blocks(twin):
                block.gamma.zero_()
        assert not torch.equal(twin(x), expected) and torch.equal(model(x), expected)
        assert torch.equal(remove(twin)(x), remove(copy.deepcopy(model))(x))


def test_timm_ema_follows():
    model = fade_in(insert(tiny(), "se"))
    ema = timm.utils.ModelEmaV3(model, decay=0.5)
    with torch.no_grad():
        model.layer1[0].inserted.gamma.fill_(0.7)
    ema.update(model)
    torch.testing.assert_close(ema.module.layer1[0].inserted.gamma, torch.tensor(0.5))


def test_distributed(tmp_path):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    try:
        model = insert(tiny(), "se").train()
        DistributedDataParallel(model)(image()).sum().backward()
        assert all(block.gamma.grad is not None for block in inserted_blocks(model))
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("where", ["blocks", "stages"])
def test_compiles_to_one_graph(where):
    torch._dynamo.reset()
    model = fade_in(insert(tiny(), "se", where=where)).train()
    twin = copy.deepcopy(model)
    x = image()
    output = torch.compile(model, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(output, twin(x))
    output.sum().backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("strict", [False, True])
def test_exports(strict):
    model = fade_in(insert(tiny(), "se"))
    dynamic = {
        0: torch.export.Dim.DYNAMIC,
        2: torch.export.Dim.DYNAMIC,
        3: torch.export.Dim.DYNAMIC,
    }
    with torch.no_grad():
        program = torch.export.export(model, (image(),), dynamic_shapes=(dynamic,), strict=strict)
        assert {"layer1.0.inserted.gamma", "layer1.0.inserted.block.fc1.weight"} <= set(
            program.state_dict
        )
        x = image(3, 3, 24, 31)
        torch.testing.assert_close(program.module()(x), model(x))


# Replace


@pytest.mark.parametrize(
    ("build", "old"),
    [
        (torchvision.models.mobilenet_v3_small, "SqueezeExcitation"),
        (lambda: timm.create_model("seresnet18"), "SEModule"),
        (lambda: timm.create_model("mobilenetv3_small_050"), "SqueezeExcite"),
    ],
    ids=["torchvision", "timm-seresnet", "timm-mobilenet"],
)
def test_replace_others_layers(build, old):
    model = build().eval()
    hosts = [name for name, part in model.named_modules() if type(part).__name__ == old]
    assert replace(model, "se", "eca", example=(1, 3, 64, 64)) is model
    assert hosts and all(type(model.get_submodule(name)) is BLOCKS["eca"].block for name in hosts)
    assert not any(type(part).__name__ == old for part in model.modules())
    assert model(image(1, 3, 64, 64)).isfinite().all()
    assert not any(part.training for part in model.modules())


def test_replace_by_class_name_and_in_own_networks():
    model = replace(ResNet(TINY, 5, block="se").eval(), "se", "se", reduction=2)
    assert model.layer1[0].slot.fc1.out_features == 4
    model = replace(model, "SqueezeExcite", "se", reduction=4)
    assert model.layer1[0].slot.fc1.out_features == 2
