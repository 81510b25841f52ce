"""What all methods promise: an unchanged model, targets, options, bad input, memory."""

import copy

import pytest
import torch
from map_cases import CLASSES, FAMILIES, NAMED, SmallCNN, built, tiny
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from visattn.blocks.catalog import create_block
from visattn.methods.explain import METHODS, explain
from visattn.methods.legrad import legrad
from visattn.methods.raw import dino
from visattn.methods.rollout import rollout
from visattn.record import capture, entry

ATTENTION = ("raw", "rollout", "grad_attention", "grad_rollout", "gae", "legrad", "dino")
CAMS = ("gradcam", "gradcam++", "hirescam", "layercam", "eigencam")


def pooled_score(output):
    return output.pooler_output[:, 3]


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_every_family_is_explained_as_shipped(family):
    model, images = built(family)
    target = torch.tensor([3, 1])
    if family.name == "hf_clip_vision":
        target = pooled_score  # the model returns no logits
    for method in ("rollout", "gae", "hirescam"):
        heat = explain(model, images, target, method)
        assert heat.values.ndim == 3
        assert len(heat) == 2
        assert heat.values.isfinite().all()
        assert heat.values.dtype == torch.float32
        assert not heat.values.requires_grad
        assert heat.notes["outliers"].shape == heat.values.shape


@pytest.mark.parametrize("method", METHODS)
def test_model_and_images_stay_as_they_were(method):
    if method == "integrated_gradients":
        pytest.importorskip("captum")
    model, images = built(NAMED["timm_vit"])
    model.train()
    model.blocks[0].eval()
    model.head.weight.requires_grad_(False)
    model.norm.weight.grad = torch.ones_like(model.norm.weight)
    modes = [module.training for module in model.modules()]
    weights = copy.deepcopy(model.state_dict())
    original = images.clone()
    heat = explain(model, images, 3, method)
    assert [module.training for module in model.modules()] == modes
    assert {name for name, p in model.named_parameters() if p.grad is not None} == {"norm.weight"}
    assert torch.equal(model.norm.weight.grad, torch.ones_like(model.norm.weight))
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["head.weight"]
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert torch.equal(images, original)
    assert images.grad is None
    assert not images.requires_grad
    assert not any(
        m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in model.modules()
    )
    with torch.inference_mode():
        torch.testing.assert_close(explain(model, images, 3, method).values, heat.values)
    alone = [explain(model, images[b : b + 1], 3, method).values[0] for b in range(2)]
    scale = heat.values.abs().max().item()
    torch.testing.assert_close(torch.stack(alone), heat.values, atol=1e-4 * scale, rtol=1e-3)


def test_a_compiled_model_is_explained_uncompiled():
    model, images = built(NAMED["timm_vit"])
    compiled = torch.compile(model, backend="eager")
    for method in ("rollout", "legrad", "gradcam"):
        expected = explain(model, images, 3, method).values
        torch.testing.assert_close(explain(compiled, images, 3, method).values, expected)


def test_targets():
    model, images = built(NAMED["timm_vit"])
    predicted = model(images).argmax(1)
    heat = explain(model, images)
    assert torch.equal(heat.target, predicted)
    for same in (predicted, lambda output: output.gather(1, predicted[:, None])):
        torch.testing.assert_close(explain(model, images, same).values, heat.values)
    with pytest.raises(ValueError, match=r"target must lie in 0 to 6; got \[7\]"):
        explain(model, images, 7)
    with pytest.raises(
        ValueError, match=r"target must be a class or one class per image, \(2,\); got shape \(3,\)"
    ):
        explain(model, images, torch.tensor([1, 2, 3]))
    with pytest.raises(ValueError, match=r"target must hold class numbers; got torch\.float32"):
        explain(model, images, torch.tensor([1.0, 2.0]))


def test_options_reach_the_method():
    model, images = built(NAMED["timm_vit"])
    with torch.no_grad(), capture(model) as maps:
        model(images)
    for method, of_maps, options in (
        ("rollout", rollout, {"head_fusion": "max"}),
        ("dino", dino, {"head": 1, "mass": 0.9}),
    ):
        heat = explain(model, images, method=method, **options)
        torch.testing.assert_close(heat.values, of_maps(maps, **options).values)
        assert not torch.equal(heat.values, explain(model, images, method=method).values)
    with pytest.raises(
        TypeError, match=r"dino has no option 'heads'; did you mean 'head'.* known: head, mass"
    ):
        explain(model, images, method="dino", heads=1)
    with pytest.raises(TypeError, match="gae has no option 'mass'; known: none"):
        explain(model, images, method="gae", mass=0.5)
    pytest.importorskip("captum")
    coarse = explain(model, images, 3, "integrated_gradients", steps=2)
    assert not torch.allclose(
        coarse.values, explain(model, images, 3, "integrated_gradients").values
    )


def test_the_table_prints_what_methods_take():
    lines = repr(METHODS).splitlines()
    assert len(lines) == 1 + len(METHODS)
    assert next(line for line in lines if line.startswith("dino")).endswith("head, mass")


def test_bad_input():
    model, images = built(NAMED["timm_vit"])
    with pytest.raises(
        ValueError, match=r"unknown method 'rolout'; did you mean 'rollout'.* known: raw, rollout, "
    ):
        explain(model, images, method="rolout")
    with pytest.raises(ValueError, match="images must be finite"):
        explain(model, images * torch.nan)
    with pytest.raises(
        ValueError, match=r"images must be a float tensor \(B, C, H, W\); got \(3, 48, 80\)"
    ):
        explain(model, images[0])
    for wrong in (images[:, :1], images[:, :, :33]):
        with pytest.raises(ValueError, match=r"the model refused images of shape \(2, "):
            explain(model, wrong)
    for method in METHODS:
        if method == "integrated_gradients":
            pytest.importorskip("captum")
        with pytest.raises(
            ValueError, match=r"images must hold at least one image .*; got shape \(0, 3, 48, 80\)"
        ):
            explain(model, images[:0], method=method)
    with pytest.raises(ValueError, match=r"layer 'blocks.7.attn' does not exist; did you mean"):
        explain(model, images, layers=["blocks.7.attn"])
    with pytest.raises(ValueError, match=r"no attention was seen in SmallCNN: .*method='gradcam'"):
        explain(SmallCNN(), images)
    with torch.no_grad():
        model.blocks[0].attn.qkv.weight[5] = torch.nan
    for method in ("rollout", "gae", "gradcam"):
        with pytest.raises(ValueError, match="values that are not finite"):
            explain(model, images, 1, method)


@pytest.mark.parametrize("method", ATTENTION)
def test_layers_that_select_nothing_are_refused_alike(method):
    model, images = built(NAMED["timm_vit"])
    for nothing in (slice(20, 30), slice(0, 0), []):
        with pytest.raises(
            ValueError,
            match=r"layers selects none of the 2 token layers, 0 blocks.0.attn, 1 blocks.1",
        ):
            explain(model, images, 1, method, layers=nothing)
    expected = explain(model, images, 1, method, layers=0).values
    for same in ([0], slice(0, 1), ["blocks.0.attn"], "blocks.0.attn"):
        torch.testing.assert_close(explain(model, images, 1, method, layers=same).values, expected)


@pytest.mark.parametrize("method", [name for name in ATTENTION if name != "dino"])
def test_layers_are_taken_first_to_last(method):
    model, images = built(NAMED["timm_vit"])
    forward = explain(model, images, 1, method, layers=slice(None))
    for layers in (slice(None, None, -1), [1, 0]):
        backward = explain(model, images, 1, method, layers=layers)
        assert backward.layer == forward.layer
        torch.testing.assert_close(backward.values, forward.values)


def test_dino_shows_one_layer():
    model, images = built(NAMED["timm_vit"])
    with pytest.raises(
        ValueError, match=r"layers must select one layer, .*; got 2: blocks.0.attn, blocks.1.attn"
    ):
        explain(model, images, method="dino", layers=slice(None))
    gates = create_block("cbam", 8).eval()
    with torch.no_grad(), capture(gates) as maps:
        gates(torch.rand(2, 8, 5, 7))
    with pytest.raises(
        ValueError,
        match="this method needs attention between tokens; the model has channel, spatial",
    ):
        dino(maps)


def test_legrad_refuses_attention_outside_its_blocks():
    model, images = built(NAMED["timm_siglip"])
    with pytest.raises(
        ValueError, match=r"layers selects attn_pool, outside the blocks .*: blocks.0, blocks.1"
    ):
        explain(model, images, 1, "legrad", layers=["attn_pool"])


def test_a_map_of_zeros_is_no_silent_answer():
    model, images = built(NAMED["timm_vit"])
    with torch.no_grad():
        model.head.weight[3] = 0
    for method in ("gae", "legrad", "gradcam", "grad_rollout"):
        with pytest.raises(ValueError, match=f"{method} computed a map of zeros"):
            explain(model, images, 3, method)
    heat = explain(model, images, torch.tensor([3, 4]), "gae")
    assert heat.notes["all_zero"].tolist() == [True, False] and heat[0].notes["all_zero"]


class Unlisted(nn.Module):
    """Two blocks that stand in no list."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Conv2d(3, 12, 4, 4)
        self.one = nn.TransformerEncoderLayer(12, 3, 24, batch_first=True, dropout=0.0)
        self.two = nn.TransformerEncoderLayer(12, 3, 24, batch_first=True, dropout=0.0)
        self.head = nn.Linear(12, CLASSES)

    def forward(self, images):
        x = self.embed(images).flatten(2).transpose(1, 2)
        x = self.two(self.one(x))
        return self.head(x.mean(1))


def test_legrad_takes_a_head_where_it_finds_none():
    torch.manual_seed(0)
    model, images = Unlisted().eval(), torch.randn(2, 3, 12, 20)
    with pytest.raises(
        ValueError, match="inside blocks that are listed in a module list; pass head="
    ):
        explain(model, images, 1, "legrad")
    heat = legrad(model, images, 1, head=lambda tokens: model.head(tokens.mean(1)))
    assert heat.layer == "one.self_attn to two.self_attn"

    class Listed(Unlisted):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList([model.one, model.two])
            self.embed = model.embed
            self.head = model.head
            del self.one, self.two

        def forward(self, images):
            x = self.embed(images).flatten(2).transpose(1, 2)
            for block in self.blocks:
                x = block(x)
            return self.head(x.mean(1))

    torch.testing.assert_close(explain(Listed().eval(), images, 1, "legrad").values, heat.values)
    with pytest.raises(ValueError, match="legrad found no block around the attention"):
        legrad(tiny()[0], images, 1, head=lambda tokens: tokens)


def test_legrad_needs_a_head_for_blocks_of_several_shapes():
    model, images = built(NAMED["timm_swin"])
    with pytest.raises(
        ValueError, match=r"legrad needs blocks that return tokens of one shape.*pass head="
    ):
        explain(model, images, 1, "legrad")
    draw = torch.Generator().manual_seed(0)
    weights = {width: torch.randn(width, CLASSES, generator=draw) for width in (24, 48)}

    def head(tokens):
        return tokens.flatten(1, -2).mean(1) @ weights[tokens.shape[-1]]

    heat = legrad(model, images, 1, head=head)
    assert heat.values.shape == (2, 16, 24)
    assert heat.values.min() >= 0
    assert heat.values.std() > 0


def test_outlier_patches_are_flagged():
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(12, 3, 24, batch_first=True).eval()
    x = torch.randn(1, 100, 12) * 0.1
    model.self_attn.in_proj_weight.data[:24] = torch.cat([torch.eye(12), torch.eye(12)]) * 20
    x[0, :, 0] = 1
    x[0, 37, 0] = 3
    with torch.no_grad(), capture(model, grid=(10, 10)) as maps:
        model(x)
    flagged = rollout(maps).notes["outliers"]
    assert flagged.nonzero().tolist() == [[0, 3, 7]]


class _Largest(TorchDispatchMode):
    """Remember the most elements any operation returned."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        for x in output if isinstance(output, (tuple, list)) else [output]:
            if isinstance(x, torch.Tensor):
                self.elements = max(self.elements, x.numel())
        return output


@pytest.mark.parametrize("method", ["rollout", "gae", "grad_rollout", "legrad"])
def test_no_matrix_of_all_pairs_is_formed(method, monkeypatch):
    """A map of 400 tokens and 3 heads has 480,000 weights; the widest activation has 77,000."""
    monkeypatch.setattr(entry, "TILE", 2**15)
    model = NAMED["timm_deit3"].build().eval()
    model, images = nn.Sequential(model), torch.randn(1, 3, 320, 320)
    model[0].patch_embed.img_size = (320, 320)
    model[0].pos_embed = nn.Parameter(torch.randn(1, 400, 48))
    with _Largest() as largest:
        explain(model, images, 1, method)
    assert 400 * 3 * 16 <= largest.elements <= 320 * 320 * 3
