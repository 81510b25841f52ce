"""capture(): what it keeps, what it refuses, and that it leaves nothing behind."""

import gc
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from map_cases import NAMED, built, tiny
from torch import nn

from visattn.core.attention import RELATIONS
from visattn.core.normalize import NORMALIZERS
from visattn.methods.explain import explain
from visattn.record import capture


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
    assert (
        record.q.untyped_storage().nbytes() == record.q.numel() * 4
    )  # a copy, not a view that keeps v alive
    assert kept["rows"].nbytes == 2 * 3 * 15 * 4 and kept["maps"].layers[0].alpha.shape == (
        2,
        3,
        15,
        15,
    )
    with pytest.raises(ValueError, match="kept one row only"):
        kept["rows"].map(query=(0, 0))
    with (
        pytest.raises(ValueError, match="keep must be one of qk, rows, maps; got 'all'"),
        capture(model, keep="all"),
    ):
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
    torch.testing.assert_close(
        maps.map("blocks.1.attn", query=20).values.flatten(1), weights.mean(1)[:, 25, 5:]
    )
    torch.testing.assert_close(
        maps.map(query="mean").values.flatten(1), weights.mean(1)[:, 5:, 5:].mean(1)
    )


@torch.no_grad()
def test_what_does_not_exist_is_refused_with_what_does():
    model, images = tiny()
    with capture(model) as maps:
        with pytest.raises(ValueError, match="no image has been run through TinyNet"):
            maps.map()
        model(images)
    with pytest.raises(ValueError, match=r"layer 3 does not exist; there are 1: 0 mix"):
        maps.map(3)
    with pytest.raises(
        ValueError, match=r"layer 'mix_' does not exist; did you mean 'mix'\? Layers: mix"
    ):
        maps.map("mix_")
    with pytest.raises(ValueError, match=r"head 7 does not exist; 'mix' has heads 0 to 2"):
        maps.map(head=7)
    for query in ((3, 0), 15, "cls", "top"):
        with pytest.raises(
            ValueError, match=r"query must be 'auto', 'mean', \(y, x\) within \(3, 5\), or 0 to 14"
        ):
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


@pytest.mark.parametrize("keep", ["rows", "maps"])
@torch.no_grad()
def test_weights_that_training_draws_are_not_drawn_again(keep):
    """A second draw would be of weights that never acted, and would change what the model returns next."""
    normalize = NORMALIZERS["gumbel"](3, generator=torch.Generator().manual_seed(0))
    module, x = RELATIONS["self"](12, 3, normalize=normalize), torch.randn(2, 15, 12)
    with capture(module, keep=keep, grid=(3, 5)) as maps:
        with pytest.raises(
            ValueError,
            match=rf"keep='{keep}' would draw .* Gumbel is random in training; call model",
        ):
            module.train()(x)
        assert not maps.records
        module.eval()(x)
    assert maps.map().values.shape == (2, 3, 5)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in module.modules())
    passes = []
    for watch in (False, True):
        normalize.generator.manual_seed(1)
        with capture(module, grid=(3, 5)) if watch else nullcontext():
            passes.append([module.train()(x) for _ in range(2)])
    assert all(torch.equal(alone, watched) for alone, watched in zip(*passes, strict=True))


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
def test_nothing_grows_over_a_thousand_images():
    """The latest pass replaces the one before, and explaining leaves nothing."""
    model, images = tiny()
    images = images.repeat(5, 1, 1, 1)
    with capture(model) as maps:
        model(images)
        sizes, tensors = maps.nbytes, _tensors()
        for _ in range(100):
            model(images)
        assert len(maps.layers) == 1 and maps.nbytes == sizes
        assert _tensors() <= tensors + 2
    for method in ("rollout", "gae", "gradcam"):
        explain(model, images, 1, method)
        tensors = _tensors()
        for _ in range(100):
            explain(model, images, 1, method)
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
    with (
        capture(model),
        pytest.raises(RuntimeError, match="being captured already"),
        capture(model),
    ):
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
    with pytest.raises(
        ValueError, match="no grid was found behind the 17 keys of 'self_attn'; pass grid="
    ):
        maps.map()
    with capture(model, grid=(3, 5)) as maps:
        model(x)
    assert (maps.layers[0].grid, maps.layers[0].prefix) == ((3, 5), 2)
    with (
        pytest.raises(ValueError, match=r"grid=\(4, 5\) has more patches than the 17 tokens"),
        capture(model, grid=(4, 5)),
    ):
        model(x)
