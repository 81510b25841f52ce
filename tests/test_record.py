"""capture(): what it sees on anyone's model."""

import pytest
import torch
import torch.nn.functional as F
from map_cases import FAMILIES, NAMED, built, eager_weights, output_of, set_fused, tiny
from relation_cases import RELATION_CASES
from torch import nn

from visattn.blocks.catalog import create_block
from visattn.core.attention import RELATIONS
from visattn.core.formula import attention_map
from visattn.core.normalize import NORMALIZERS
from visattn.core.similarity import SIMILARITIES
from visattn.core.tap import Tap
from visattn.models.presets import create_model
from visattn.record import capture


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
@torch.no_grad()
def test_weights_equal_the_models_own_softmax(family):
    model, images = built(family)
    set_fused(model, False)
    with eager_weights(model) as eager:
        model(images)
    set_fused(model, True)
    plain = output_of(model(images))
    with capture(model) as maps:
        watched = output_of(model(images))

    assert torch.equal(plain, watched)
    described = [(r.name, r.heads, r.grid, r.prefix) for r in (maps.layers[0], maps.layers[-1])]
    assert described == [family.first, family.last]
    assert len(maps.layers) == family.count == len(eager)
    assert tuple(sorted({record.kind for record in maps.layers})) == family.kinds
    for record, weights in zip(maps.layers, eager, strict=True):
        assert (record.keys.index is not None) == family.windows
        torch.testing.assert_close(
            record.weights(), weights.reshape(record.weights().shape), atol=1e-5, rtol=1e-4
        )


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
@torch.no_grad()
def test_as_shipped(family):
    """Without choosing fused or eager: the same layers are found, and rows of patches sum to one with the prefix."""
    model, images = built(family)
    with capture(model) as maps:
        model(images)
    assert [record.name for record in maps.layers][:: family.count - 1] == [
        family.first[0],
        family.last[0],
    ]
    assert maps.map().values.shape == (2, *family.last[2])
    heat = maps.map(0)
    assert heat.values.min() >= 0
    total = heat.values.sum((1, 2)) + heat.prefix_mass
    if "padded" in family.name or family.name == "torchvision_swin":
        assert (total < 1).all()  # padding takes part in the softmax of a window, and is no patch
    else:
        torch.testing.assert_close(total, torch.ones(2))


def test_every_pair_of_the_formula_is_recorded_as_it_was_evaluated():
    torch.manual_seed(0)
    x = torch.randn(2, 7, 12)
    pairs = [(name, "softmax") for name in SIMILARITIES] + [
        ("scaled_dot", name) for name in NORMALIZERS
    ]
    for similarity, normalize in pairs:
        pair = SIMILARITIES[similarity](4, 3), NORMALIZERS[normalize](3)
        module = RELATIONS["self"](12, 3, similarity=pair[0], normalize=pair[1]).eval()
        seen = {}
        module.attend.register_forward_hook(
            lambda _, args, m, seen=seen: seen.update(v=args[2], m=m)
        )
        with torch.no_grad(), capture(module) as maps:
            module(x)
        (record,) = maps.layers
        torch.testing.assert_close(
            record.weights() @ seen["v"], seen["m"], atol=1e-5, rtol=1e-4, msg=str(pair)
        )
        u = torch.rand(2, 7)
        torch.testing.assert_close(
            record.apply(u), torch.einsum("bq,bhqk->bk", u, record.weights()) / 3
        )


@pytest.mark.parametrize(
    "name", ["window", "shifted_window", "grid", "axial", "criss_cross", "neighborhood"]
)
def test_own_layouts_put_weights_where_the_tokens_lie(name):
    """Changing one token's value changes exactly the outputs of the queries that give it weight."""
    torch.manual_seed(0)
    case = RELATION_CASES[name]
    module = RELATIONS[name](12, 3, **case.options).eval()
    x = torch.randn(1, 35, 12)
    with torch.no_grad(), capture(module, grid=(5, 7)) as maps:
        module(x, grid=(5, 7))
    assert all(record.grid == (5, 7) for record in maps.layers)
    identity = torch.eye(35)[:, None]
    dense = [torch.cat([record.apply(row) for row in identity]) for record in maps.layers]
    assert all(torch.allclose(alpha.sum(1), torch.ones(35), atol=1e-5) for alpha in dense)
    if case.meets is not None:
        places = [(y, x) for y in range(5) for x in range(7)]
        meets = torch.tensor([[case.meets(a, b) for b in places] for a in places])
        assert torch.equal(dense[0] > 0, meets)
    heat = maps.map(0, query=(2, 3))
    torch.testing.assert_close(heat.values.flatten(), dense[0][2 * 7 + 3])


def test_class_pool_and_memory_relations_know_their_tokens():
    torch.manual_seed(0)
    x = torch.randn(2, 36, 12)
    model = RELATIONS["class"](12, 3)
    with torch.no_grad(), capture(model, grid=(5, 7)) as maps:
        model(x)
    assert (maps.layers[0].queries.tokens, maps.layers[0].prefix, maps.layers[0].pool) == (
        1,
        1,
        False,
    )
    model = RELATIONS["pool"](12, 3)
    with torch.no_grad(), capture(model, grid=(5, 7)) as maps:
        model(x[:, 1:])
    assert (maps.layers[0].prefix, maps.layers[0].pool) == (0, True)
    assert maps.map().values.shape == (2, 5, 7)


def test_any_multihead_attention():
    model, images = tiny()
    with torch.no_grad(), capture(model) as fused:
        plain = model(images)
    model.need_weights = True
    with torch.no_grad(), capture(model) as eager:
        model(images)
    assert torch.equal(plain, _without_weights(model, images))
    (a,), (b,) = fused.layers, eager.layers
    assert (a.name, a.grid, a.heads, b.heads) == ("mix", (3, 5), 3, 3)
    torch.testing.assert_close(a.weights(), model.weights)
    assert torch.equal(b.weights(), model.weights)


def _without_weights(model, images):
    model.need_weights = False
    with torch.no_grad():
        output = model(images)
    model.need_weights = True
    with torch.no_grad():
        model(images)
    return output


def test_the_native_path_of_the_encoder_layer_is_bypassed():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.TransformerEncoderLayer(12, 3, 24, batch_first=True, dropout=0.0)
    ).eval()
    x = torch.randn(2, 15, 12)
    with torch.no_grad():
        plain = model(x)
        with capture(model, grid=(3, 5)) as maps:
            watched = model(x)
    torch.testing.assert_close(plain, watched, atol=1e-6, rtol=0)
    assert [record.name for record in maps.layers] == ["0.self_attn"]


@torch.no_grad()
def test_causal_and_masked_calls():
    class Net(nn.Module):
        def forward(self, q):
            q = F.scaled_dot_product_attention(q, q, q, is_causal=True)
            mask = torch.ones(6, 6, dtype=torch.bool).tril(2)
            return F.scaled_dot_product_attention(q, q, q, attn_mask=mask, scale=0.3)

    torch.manual_seed(0)
    q, model = torch.randn(2, 3, 6, 5), Net()
    with capture(model, grid=(2, 3)) as maps:
        model(q)
    first, second = (record.weights() for record in maps.layers)
    assert [record.name for record in maps.layers] == ["Net[0]", "Net[1]"]
    assert torch.equal(first.tril(), first) and first.sum(-1).allclose(torch.ones(2, 3, 6))
    after = first @ q
    expected = attention_map(
        after * 0.3 * 5**0.5, after, mask=torch.ones(6, 6, dtype=torch.bool).tril(2)
    )
    torch.testing.assert_close(second, expected)


@torch.no_grad()
def test_gates_are_records_of_their_kind():
    torch.manual_seed(0)
    model, x = create_block("cbam", 8).eval(), torch.randn(2, 8, 5, 7)
    taps = []
    for module in model.modules():
        if isinstance(module, Tap):
            module.register_forward_hook(lambda m, a, output: taps.append(output))
    with capture(model) as maps:
        model(x)
    assert [record.kind for record in maps.layers] == ["channel", "spatial"]
    for record, gate in zip(maps.layers, taps, strict=True):
        assert torch.equal(record.alpha, gate)
    energy = maps.map(0)
    torch.testing.assert_close(energy.values, (x.abs() * taps[0]).sum(1))
    torch.testing.assert_close(maps.map(-1).values, taps[1].mean(1))
    torch.testing.assert_close(maps.map(0, head=3).values, taps[0][:, 3])


@torch.no_grad()
def test_own_vision_transformers():
    torch.manual_seed(0)
    images = torch.randn(2, 3, 48, 64)
    for options, prefix in (
        ({"pool": "mean"}, 1),
        ({"num_registers": 2}, 3),
        ({"similarity": "additive"}, 1),
    ):
        model = create_model(
            "vit_nano", num_classes=5, image_size=(48, 64), depth=2, **options
        ).eval()
        with capture(model) as maps:
            model(images)
        assert [record.name for record in maps.layers] == ["blocks.0.attn", "blocks.1.attn"]
        assert (maps.layers[0].grid, maps.layers[0].prefix) == ((6, 8), prefix)


@torch.no_grad()
def test_batches_do_not_mix():
    for name in ("timm_vit", "torchvision_swin"):
        model, images = built(NAMED[name])
        with capture(model) as both:
            model(images)
        with capture(model) as one:
            model(images[1:])
        torch.testing.assert_close(both.map(0).values[1:], one.map(0).values, atol=1e-5, rtol=1e-4)
