"""The contract of every vision transformer, and what is equal to timm."""

import copy
import io
import pickle
import re

import pytest
import timm
import torch
from model_cases import MODEL_CASES, SIZE, build
from timm.optim import param_groups_layer_decay

from visattn.core.attention import RELATIONS
from visattn.core.formula import Attend
from visattn.core.normalize import NORMALIZERS
from visattn.core.position import POSITIONS
from visattn.core.similarity import SIMILARITIES
from visattn.models.build import MIXERS, build_vit, known_options
from visattn.models.presets import MODELS, create_model
from visattn.models.stem import TOKEN_STEMS
from visattn.models.vit import resize_positions
from visattn.record import capture

every_case = pytest.mark.parametrize("name", MODEL_CASES)
VITS = [name for name, entry in MODELS.items() if entry.build is build_vit]
TIMM = {
    name: name if "dinov2" in name else f"{name}_224"
    for name in VITS
    if name not in ("vit_nano", "vit_micro")
}
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def images(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_the_table_prints_one_line_per_model():
    header, *lines = str(MODELS).splitlines()
    assert header.split("  ")[0] == "name" and "default options" in header
    assert [line.split()[0] for line in lines] == list(MODELS)


def test_the_cases_use_every_option():
    used = {option for options in MODEL_CASES.values() for option in options}
    used |= {"dim", "depth", "num_heads", "patch_size", "image_size", "num_classes"}  # all cases
    tested_below = {"in_channels", "mlp_ratio", "drop_path", "dropout"}
    assert used | tested_below == set(known_options(build_vit))
    positions = {options.get("position", "learned") for options in MODEL_CASES.values()}
    assert positions == {"learned", "none", *POSITIONS}


@pytest.mark.parametrize("name", TIMM)
def test_shapes_and_keys_are_those_of_timm(name):
    with torch.device("meta"):
        theirs, ours = (
            timm.create_model(TIMM[name], num_classes=7),
            create_model(name, num_classes=7),
        )
    assert {k: v.shape for k, v in ours.state_dict().items()} == {
        k: v.shape for k, v in theirs.state_dict().items()
    }
    assert (
        len(ours.blocks) == len(theirs.blocks)
        and ours.blocks[0].attn.num_heads == theirs.blocks[0].attn.num_heads
    )


@pytest.mark.parametrize(
    "name, native, other",
    [
        ("vit_tiny_patch16", (224, 224), (160, 256)),
        ("deit3_small_patch16", (224, 224), (96, 144)),
        ("vit_small_patch14_reg4_dinov2", (518, 518), (140, 196)),
    ],
)
def test_timm_weights_give_timm_outputs(name, native, other):
    torch.manual_seed(0)
    theirs = timm.create_model(TIMM[name], num_classes=7, dynamic_img_size=True).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    ours = create_model(name, num_classes=7).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    with torch.no_grad():
        for size in (native, other):
            x = images(1, 3, *size)
            torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "ours, theirs",
    [
        ({}, {"dynamic_img_pad": True}),
        ({"pool": "mean"}, {"global_pool": "avg"}),
        ({"pool": "mean", "class_token": False}, {"global_pool": "avg", "class_token": False}),
        ({"pool": "attention", "class_token": False}, {"global_pool": "map", "class_token": False}),
        ({"num_registers": 2, "qk_norm": True}, {"reg_tokens": 2, "qk_norm": True}),
    ],
    ids=["padding", "mean", "mean_without_class", "attention", "registers"],
)
def test_options_agree_with_timm(ours, theirs):
    torch.manual_seed(0)
    theirs = timm.models.VisionTransformer(
        img_size=SIZE,
        patch_size=4,
        embed_dim=12,
        depth=2,
        num_heads=3,
        num_classes=5,
        dynamic_img_size=True,
        **theirs,
    ).eval()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model = build("plain", **ours)
    model.load_state_dict(theirs.state_dict(), strict=True)
    sizes = [SIZE, (12, 36)] + ([(11, 30)] if not ours else [])
    for size in sizes:
        x = images(2, 3, *size)
        torch.testing.assert_close(model(x), theirs(x), **CLOSE)


@every_case
def test_any_image_size(name):
    model = build(name)
    for size in (SIZE, (4, 4), (1, 1), (1, 13), (31, 17)):
        y = model(images(2, 3, *size))
        assert y.shape == (2, 5) and y.isfinite().all()


@every_case
def test_repeats_and_images_do_not_mix(name):
    model, x = build(name), images(2, 3, *SIZE)
    before = x.clone()
    y = model(x)
    assert torch.equal(model(x), y) and torch.equal(x, before)
    torch.testing.assert_close(model(x[1:]), y[1:], **CLOSE)
    torch.testing.assert_close(model(x.to(memory_format=torch.channels_last)), y, **CLOSE)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(model(x).float(), y, rtol=0.1, atol=0.1)
    assert not torch.allclose(y[0], y[1])


@every_case
def test_every_parameter_learns(name):
    model = build(name, depth=1)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    torch.nn.functional.cross_entropy(model(images(2, 3, *SIZE)), torch.tensor([1, 4])).backward()
    for key, parameter in model.named_parameters():
        assert (
            parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.any()
        ), key


@every_case
def test_copies(name):
    model, x = build(name), images(2, 3, *SIZE)
    fresh = build(name)
    fresh.load_state_dict(model.state_dict())
    for twin in (copy.deepcopy(model), pickle.load(io.BytesIO(pickle.dumps(model))), fresh):
        assert torch.equal(twin(x), model(x))


@every_case
def test_meta_device(name):
    assert build(name).to("meta")(torch.empty(2, 3, *SIZE, device="meta")).is_meta


@every_case
def test_maps_act(name):
    """Each block has one Attend, and what it gives is what goes on."""
    model, x = build(name), images(2, 3, *SIZE)
    y = model(x)
    seams = [
        m for key, m in model.named_modules() if isinstance(m, Attend) and key.startswith("blocks.")
    ]
    assert len(seams) == len(model.blocks)
    for seam in seams:
        handle = seam.register_forward_hook(lambda m, i, o: o.flip(2))
        assert not torch.allclose(model(x), y)
        handle.remove()


@pytest.mark.parametrize("name", ["plain", "conv_stem", "rope"])
def test_compiles_whole(name):
    torch.compiler.reset()
    model, x = build(name, depth=1), images(2, 3, *SIZE)
    torch.testing.assert_close(
        torch.compile(model, fullgraph=True, backend="aot_eager")(x), model(x), **CLOSE
    )


@pytest.mark.parametrize("name", ["plain", "dinov2", "conv_stem", "rope"])
def test_exports_with_any_batch_and_size(name):
    model, dynamic = build(name, depth=1), torch.export.Dim.DYNAMIC
    shapes = ({0: dynamic, 2: dynamic, 3: dynamic},)
    program = torch.export.export(
        model, (images(2, 3, *SIZE),), dynamic_shapes=shapes, strict=False
    )
    for x in (images(3, 3, 24, 36), images(1, 3, 22, 27)):
        torch.testing.assert_close(program.module()(x), model(x), **CLOSE)


def test_positions_are_resized_on_load():
    small, large = build("plain", image_size=16), build("plain", image_size=(24, 32))
    large.load_state_dict(small.state_dict(), strict=True)
    expected = resize_positions(small.pos_embed, (4, 4), (6, 8), prefix=1)
    torch.testing.assert_close(large.pos_embed.detach(), expected.detach())
    x = images(2, 3, 24, 32)
    torch.testing.assert_close(large(x), small(x), **CLOSE)
    with pytest.raises(
        RuntimeError, match=r"size mismatch for pos_embed: .*\[1, 36, 12\].*\[1, 17, 12\]"
    ):
        small.load_state_dict(build("plain").state_dict())  # 5 x 7 tokens: not a square


def test_resized_positions_of_the_same_grid_are_the_same():
    positions = images(1, 1 + 35, 12)
    torch.testing.assert_close(
        resize_positions(positions, (5, 7), (5, 7), prefix=1), positions, rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_every_similarity_by_name(similarity):
    model = build("plain", similarity=similarity)
    assert all(
        type(block.attn.attend.similarity) is SIMILARITIES[similarity] for block in model.blocks
    )
    assert model.blocks[0].attn.attend.similarity is not model.blocks[1].attn.attend.similarity
    assert model(images(2, 3, *SIZE)).isfinite().all()


@pytest.mark.parametrize("normalize", NORMALIZERS)
def test_every_normalizer_by_name(normalize):
    model = build("plain", normalize=normalize)
    assert all(
        type(block.attn.attend.normalize) is NORMALIZERS[normalize] for block in model.blocks
    )
    assert model(images(2, 3, *SIZE)).isfinite().all()


@pytest.mark.parametrize("relation", MIXERS)
def test_every_relation_by_name(relation):
    model = build("mean", relation=relation, qk_norm=False, num_heads=1)
    assert all(type(block.attn) is RELATIONS[relation] for block in model.blocks)
    assert model(images(2, 3, *SIZE)).isfinite().all()
    with capture(model) as maps:
        model(images(2, 3, *SIZE))
    assert len(maps.layers) == (4 if relation == "axial" else 2)


def test_channels_are_compared_over_all_tokens():
    model = build("plain", relation="channel", similarity="bilinear")
    assert model.blocks[0].attn.attend.similarity.weight.shape == (3, 36, 36)
    assert model(images(2, 3, *SIZE)).isfinite().all()


def test_relations_take_turns():
    model = build("swin", depth=3)
    assert [type(block.attn).__name__[:3] for block in model.blocks] == ["Win", "Shi", "Win"]
    assert {block.attn.window_size for block in model.blocks} == {(3, 3)}


def test_objects_by_callable():
    model = build("plain", normalize=lambda heads: NORMALIZERS["topk"](heads, k=3))
    assert model.blocks[1].attn.attend.normalize.k == 3


@pytest.mark.parametrize("stem", TOKEN_STEMS)
def test_stem_says_its_grid(stem):
    module = TOKEN_STEMS[stem](12, 4).eval()
    for size in ((1, 1), (4, 4), (5, 7), (31, 17)):
        assert tuple(module(images(1, 3, *size)).shape[2:]) == module.grid(*size)


def test_training_options():
    model = build("plain", drop_path=0.5, dropout=0.5, in_channels=1, mlp_ratio=0.5).train()
    assert model.blocks[0].mlp.fc1.out_features == 6
    assert isinstance(
        model.blocks[0].drop_path1, torch.nn.Identity
    )  # rates rise from zero with depth
    assert model.blocks[1].drop_path2.drop_prob == 0.5 and model.head_drop.p == 0.5
    x = images(2, 1, *SIZE)
    assert not torch.equal(model(x), model(x))


def test_weight_decay_and_layer_groups():
    model = build("relative", class_token=True, num_registers=1)
    names = {name for name, _ in model.named_parameters()}
    spared = {
        "cls_token",
        "reg_token",
        "blocks.0.attn.position.table",
        "blocks.1.attn.position.table",
    }
    assert model.no_weight_decay() == spared and spared < names
    groups = model.group_matcher()
    depths = {
        int(re.match(groups["blocks"][0][0], name)[1])
        for name in names
        if name.startswith("blocks.")
    }
    assert depths == {0, 1} and re.match(groups["stem"], "patch_embed.proj.weight")
    decays = param_groups_layer_decay(
        model, layer_decay=0.5, no_weight_decay_list=model.no_weight_decay()
    )
    assert sum(len(group["params"]) for group in decays) == len(names)
    assert len({group["lr_scale"] for group in decays}) == 4  # stem, two blocks, head


def test_classifier_can_be_changed():
    model, x = build("plain"), images(2, 3, *SIZE)
    model.reset_classifier(0)
    features = model(x)
    assert features.shape == (2, 12)
    model.reset_classifier(3)
    assert model.get_classifier().out_features == 3 and model(x).shape == (2, 3)
    assert torch.equal(model.forward_features(x)[:, 0], features)


@pytest.mark.parametrize("name", VITS)
def test_timm_knows_our_models(name):
    with torch.device("meta"):
        model = timm.create_model(
            f"visattn_{name}", num_classes=3, img_size=56, in_chans=1, global_pool="avg"
        )
        ours = create_model(name, num_classes=3, image_size=56, in_channels=1, pool="mean")
    assert {k: v.shape for k, v in model.state_dict().items()} == {
        k: v.shape for k, v in ours.state_dict().items()
    }


def test_timm_models_by_name():
    model = create_model("timm:test_vit", num_classes=3, image_size=64, in_channels=1)
    assert isinstance(model, timm.models.VisionTransformer)
    assert model(images(2, 1, 64, 64)).shape == (2, 3)
    assert create_model("timm:test_resnet", image_size=64).num_classes == 1000
    assert (
        create_model("timm:test_resnet.r160_in1k", num_classes=3).num_classes == 3
    )  # a name with its weights


@pytest.mark.parametrize(
    "arguments, message",
    [
        (
            {"name": "vit_tni_patch16"},
            "unknown model 'vit_tni_patch16'; did you mean 'vit_tiny_patch16'",
        ),
        ({"name": "timm:resnt18"}, "unknown timm model 'resnt18'; did you mean 'resnet18'"),
        ({"name": "timm:test_vit", "similarity": "cosine"}, "timm:test_vit has no such option: "),
        (
            {"name": "vit_nano", "dropot": 0.1},
            "unknown vit_nano option 'dropot'; did you mean 'dropout'",
        ),
        (
            {"name": "vit_nano", "similarity": "cosin"},
            "unknown similarity 'cosin'; did you mean 'cosine'",
        ),
        (
            {"name": "vit_nano", "normalize": "entmx15"},
            "unknown normalize 'entmx15'; did you mean 'entmax15'",
        ),
        ({"name": "vit_nano", "position": "rop"}, "unknown position 'rop'; did you mean 'rope'"),
        ({"name": "vit_nano", "stem": "pach"}, "unknown stem 'pach'; did you mean 'patch'"),
        ({"name": "vit_nano", "pool": "maen"}, "unknown pool 'maen'; did you mean 'mean'"),
        (
            {"name": "vit_nano", "relation": "windw"},
            "unknown relation 'windw'; did you mean 'window'",
        ),
        (
            {"name": "vit_nano", "relation": "axial"},
            "relation 'axial' folds the grid of patches: it needs class_token",
        ),
        (
            {"name": "vit_nano", "relation": "channel", "position": "rope"},
            "relation 'channel' takes no position",
        ),
        (
            {"name": "vit_nano", "window_size": 3},
            "window_size=3 has no effect: relation self takes none",
        ),
        ({"name": "vit_nano", "num_heads": 0}, "num_heads must divide dim; got num_heads=0"),
        ({"name": "vit_nano", "class_token": False}, "pool='class' needs class_token=True"),
        (
            {"name": "vit_nano", "num_heads": 5},
            "num_heads must divide dim; got num_heads=5, dim=128",
        ),
        (
            {"name": "vit_nano", "patch_size": 6},
            "patch_size of a convolution stem must be a power of two from 2",
        ),
        ({"name": "vit_tiny_patch16", "patch_size": 0}, "patch_size must be at least 1; got 0"),
        (
            {"name": "vit_nano", "pretrained": True},
            "there are no pretrained weights for 'vit_nano'",
        ),
    ],
)
def test_refusals(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        create_model(**arguments)
