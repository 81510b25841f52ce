"""capture(): what it sees on anyone's model, and that it leaves nothing behind."""

import gc

import pytest
import torch
import torch.nn.functional as F
from map_cases import FAMILIES, NAMED, built, eager_weights, output_of, set_fused
from relation_cases import RELATION_CASES
from torch import nn

from visattn.blocks.table import create_block
from visattn.core.attention import RELATIONS
from visattn.core.formula import attention_map
from visattn.core.normalize import NORMALIZERS
from visattn.core.similarity import SIMILARITIES
from visattn.core.tap import Tap
from visattn.models.table import create_model
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
        torch.testing.assert_close(record.weights(), weights.reshape(record.weights().shape), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
@torch.no_grad()
def test_as_shipped(family):
    """Without choosing fused or eager: the same layers are found, and rows of patches sum to one with the prefix."""
    model, images = built(family)
    with capture(model) as maps:
        model(images)
    assert [record.name for record in maps.layers][:: family.count - 1] == [family.first[0], family.last[0]]
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
    pairs = [(name, "softmax") for name in SIMILARITIES] + [("scaled_dot", name) for name in NORMALIZERS]
    for similarity, normalize in pairs:
        pair = SIMILARITIES[similarity](4, 3), NORMALIZERS[normalize](3)
        module = RELATIONS["self"](12, 3, similarity=pair[0], normalize=pair[1]).eval()
        seen = {}
        module.attend.register_forward_hook(lambda _, args, m, seen=seen: seen.update(v=args[2], m=m))
        with torch.no_grad(), capture(module) as maps:
            module(x)
        (record,) = maps.layers
        torch.testing.assert_close(record.weights() @ seen["v"], seen["m"], atol=1e-5, rtol=1e-4, msg=str(pair))
        u = torch.rand(2, 7)
        torch.testing.assert_close(record.apply(u), torch.einsum("bq,bhqk->bk", u, record.weights()) / 3)


@pytest.mark.parametrize("name", ["window", "shifted_window", "grid", "axial", "criss_cross", "neighborhood"])
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
    assert (maps.layers[0].queries.tokens, maps.layers[0].prefix, maps.layers[0].pool) == (1, 1, False)
    model = RELATIONS["pool"](12, 3)
    with torch.no_grad(), capture(model, grid=(5, 7)) as maps:
        model(x[:, 1:])
    assert (maps.layers[0].prefix, maps.layers[0].pool) == (0, True)
    assert maps.map().values.shape == (2, 5, 7)


class TinyNet(nn.Module):
    """A patch embedding, one nn.MultiheadAttention, a mean and a linear layer."""

    def __init__(self, need_weights: bool):
        super().__init__()
        self.embed, self.need_weights = nn.Conv2d(3, 12, 4, 4), need_weights
        self.mix = nn.MultiheadAttention(12, 3, batch_first=True)
        self.head = nn.Linear(12, 5)

    def forward(self, images):
        x = self.embed(images).flatten(2).transpose(1, 2)
        y, self.weights = self.mix(x, x, x, need_weights=self.need_weights, average_attn_weights=False)
        return self.head((x + y).mean(1))


def tiny() -> tuple[TinyNet, torch.Tensor]:
    torch.manual_seed(0)
    return TinyNet(False).eval(), torch.randn(2, 3, 12, 20)


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
    model = nn.Sequential(nn.TransformerEncoderLayer(12, 3, 24, batch_first=True, dropout=0.0)).eval()
    x = torch.randn(2, 15, 12)
    with torch.no_grad():
        plain = model(x)
        with capture(model, grid=(3, 5)) as maps:
            watched = model(x)
    torch.testing.assert_close(plain, watched, atol=1e-6, rtol=0)
    assert [record.name for record in maps.layers] == ["0.self_attn"]


@torch.no_grad()
def test_keep():
    model, images = tiny()
    kept = {}
    for keep in ("qk", "rows", "maps"):
        with capture(model, keep=keep) as maps:
            model(images)
        kept[keep] = maps
    expected = kept["qk"].map().values
    torch.testing.assert_close(kept["rows"].map().values, expected)
    torch.testing.assert_close(kept["maps"].map().values, expected)
    record = kept["qk"].layers[0]
    assert record.v is None and record.output is None and record.alpha is None
    assert record.q.untyped_storage().nbytes() == record.q.numel() * 4  # a copy, not a view that keeps v alive
    assert kept["rows"].nbytes == 2 * 3 * 15 * 4 and kept["maps"].layers[0].alpha.shape == (2, 3, 15, 15)
    with pytest.raises(ValueError, match="kept one row only"):
        kept["rows"].map(query=(0, 0))
    with pytest.raises(ValueError, match="keep must be one of qk, rows, maps; got 'all'"), capture(model, keep="all"):
        pass


@torch.no_grad()
def test_queries_and_heads():
    model, images = built(NAMED["timm_dinov2_registers"])
    with capture(model) as maps:
        model(images)
    weights = maps.layers[1].weights()
    torch.testing.assert_close(maps.map().values.flatten(1), weights.mean(1)[:, 0, 5:])
    torch.testing.assert_close(maps.map().prefix_mass, weights.mean(1)[:, 0, :5].sum(1))
    torch.testing.assert_close(
        maps.map(0, head=2, query=(1, 3)).values.flatten(1), maps.layers[0].weights()[:, 2, 15, 5:]
    )
    torch.testing.assert_close(maps.map("blocks.1.attn", query=20).values.flatten(1), weights.mean(1)[:, 25, 5:])
    torch.testing.assert_close(maps.map(query="mean").values.flatten(1), weights.mean(1)[:, 5:, 5:].mean(1))


@torch.no_grad()
def test_what_does_not_exist_is_refused_with_what_does():
    model, images = tiny()
    with capture(model) as maps:
        with pytest.raises(ValueError, match="no image has been run through TinyNet"):
            maps.map()
        model(images)
    with pytest.raises(ValueError, match=r"layer 3 does not exist; there are 1: 0 mix"):
        maps.map(3)
    with pytest.raises(ValueError, match=r"layer 'mix_' does not exist; did you mean 'mix'\? Layers: mix"):
        maps.map("mix_")
    with pytest.raises(ValueError, match=r"head 7 does not exist; 'mix' has heads 0 to 2"):
        maps.map(head=7)
    for query in ((3, 0), 15, "cls", "top"):
        with pytest.raises(ValueError, match=r"query must be 'auto', 'mean', \(y, x\) within \(3, 5\), or 0 to 14"):
            maps.map(query=query)


@torch.no_grad()
def test_a_model_without_attention_is_told_what_was_seen():
    model = nn.Sequential(nn.Conv2d(3, 5, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Softmax(1))
    with capture(model) as maps:
        model(torch.rand(2, 3, 8, 8))
    message = r"no attention was seen in Sequential: it ran 1 x softmax of shape \(2, 5\); .* method='gradcam'"
    for ask in (lambda: maps.layers, maps.map, lambda: maps.select(None), lambda: maps.nbytes):
        with pytest.raises(ValueError, match=message):
            ask()


def test_hooks_are_gone_even_after_an_error():
    model, images = tiny()
    before = {name: dict(module.__dict__) for name, module in model.named_modules()}
    with pytest.raises(RuntimeError), capture(model):
        model(images[:, :2])
    with pytest.raises(KeyError), capture(model) as maps:
        model(images)
        raise KeyError
    assert len(maps.layers) == 1
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert {name: set(module.__dict__) - {"weights"} for name, module in model.named_modules()} == {
        name: set(attributes) - {"weights"} for name, attributes in before.items()
    }
    q = torch.rand(1, 1, 2, 3)
    F.scaled_dot_product_attention(q, q, q)
    assert len(maps.layers) == 1
    with capture(model):  # the guard against a second capture is gone too
        pass


@torch.no_grad()
def test_an_error_inside_the_model_does_not_spoil_the_next_pass():
    model, images = tiny()
    with capture(model) as maps:
        with pytest.raises(RuntimeError):
            model(images[:, :2])
        model(images)
    assert [record.name for record in maps.layers] == ["mix"]


def _tensors() -> int:
    gc.collect()
    return sum(issubclass(type(x), torch.Tensor) for x in gc.get_objects())


@torch.no_grad()
def test_the_latest_pass_replaces_the_one_before():
    model, images = tiny()
    with capture(model) as maps:
        for _ in range(3):
            model(images)
        sizes = maps.nbytes
        tensors = _tensors()
        for _ in range(50):
            model(images)
        assert len(maps.layers) == 1 and maps.nbytes == sizes
        assert _tensors() <= tensors + 2


@torch.no_grad()
def test_parts_of_a_model_called_from_outside_make_one_pass():
    model, images = built(NAMED["timm_vit"])
    with capture(model) as maps:
        for _ in range(2):
            model.forward_features(images)
    assert [record.name for record in maps.layers] == ["blocks.0.attn", "blocks.1.attn"]


@torch.no_grad()
def test_capture_inside_capture():
    model, images = tiny()
    other, _ = tiny()
    with capture(model) as maps, capture(other) as others:
        model(images)
        other(images[:1])
    assert (maps.layers[0].batch, others.layers[0].batch) == (2, 1)
    with capture(model), pytest.raises(RuntimeError, match="being captured already"), capture(model):
        pass


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_half_precision_and_autocast(half):
    model, images = built(NAMED["timm_vit"])
    with capture(model) as maps:
        model(images)
    expected = maps.map().values
    with torch.autocast("cpu", half), capture(model) as maps:
        model(images)
    assert maps.layers[0].q.dtype == half and maps.map().values.dtype == torch.float32
    torch.testing.assert_close(maps.map().values, expected, atol=0.02, rtol=0.1)
    model.to(half)
    with capture(model) as maps:
        model(images.to(half))
    torch.testing.assert_close(maps.map().values, expected, atol=0.02, rtol=0.1)


@torch.no_grad()
def test_a_compiled_model_is_watched_uncompiled():
    model, images = tiny()
    compiled = torch.compile(model, backend="eager")
    plain = compiled(images)
    with capture(compiled) as maps:
        watched = compiled(images)
    torch.testing.assert_close(plain, watched)
    assert [record.name for record in maps.layers] == ["mix"]


@torch.no_grad()
def test_grid_and_prefix_can_be_given():
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(12, 3, 24, batch_first=True).eval()
    x = torch.randn(2, 17, 12)
    with capture(model) as maps:
        model(x)
    with pytest.raises(ValueError, match="no grid was found behind the 17 keys of 'self_attn'; pass grid="):
        maps.map()
    with capture(model, grid=(3, 5)) as maps:
        model(x)
    assert (maps.layers[0].grid, maps.layers[0].prefix) == ((3, 5), 2)
    with (
        pytest.raises(ValueError, match=r"grid=\(4, 5\) has more patches than the 17 tokens"),
        capture(model, grid=(4, 5)),
    ):
        model(x)


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
    expected = attention_map(after * 0.3 * 5**0.5, after, mask=torch.ones(6, 6, dtype=torch.bool).tril(2))
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
    for options, prefix in (({"pool": "mean"}, 1), ({"num_registers": 2}, 3), ({"similarity": "additive"}, 1)):
        model = create_model("vit_nano", num_classes=5, image_size=(48, 64), depth=2, **options).eval()
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
