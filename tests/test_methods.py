"""Every attention method against a slow twin of its own."""

import copy
import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from map_cases import NAMED, built, eager_weights, exact, set_fused
from map_twins import (
    attached_weights,
    dense_from_groups,
    full_gae,
    full_grad_rollout,
    full_rollout,
    grid_place,
    merge_matrix,
    softmax_maps,
    window_place,
)
from torch import nn

from visattn.core.attention import RELATIONS
from visattn.methods.chain import spread
from visattn.methods.explain import explain
from visattn.methods.raw import dino, raw
from visattn.methods.rollout import rollout
from visattn.record import capture, entry


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
@pytest.mark.parametrize("head_fusion", ["mean", "max", "min"])
@torch.no_grad()
def test_the_row_chain_is_the_ordinary_product(dtype, tolerance, head_fusion, monkeypatch):
    monkeypatch.setattr(entry, "TILE", 2 * 3 * 26 * 7)  # several tiles, the last one smaller
    model, images = built(NAMED["timm_dinov2_registers"])
    model, images = model.to(dtype), images.to(dtype)
    with capture(model) as maps:
        model(images)
    fusions = {
        "mean": lambda a: a.mean(1),
        "max": lambda a: a.amax(1),
        "min": lambda a: a.amin(1),
    }
    weights = [softmax_maps(record.q, record.k) for record in maps.layers]
    full = full_rollout(weights, fusions[head_fusion])[:, 0]
    heat = rollout(maps, head_fusion=head_fusion)
    assert heat.values.dtype == torch.float32
    torch.testing.assert_close(heat.prefix_mass, full[:, :5].sum(1).float(), atol=1e-6, rtol=0)
    torch.testing.assert_close(heat.values.flatten(1), full[:, 5:].float(), atol=1e-6, rtol=0)
    row = torch.rand(2, 26, dtype=dtype)
    for record, alpha in zip(maps.layers, weights, strict=True):
        product = row[:, None] @ alpha.mean(1)  # (B, 1, N) x (B, N, N)
        torch.testing.assert_close(record.apply(row), product[:, 0], atol=tolerance, rtol=0)


@torch.no_grad()
def test_rollout_of_some_layers():
    model, images = built(NAMED["timm_vit"])
    with capture(model) as maps:
        model(images)
    alone = rollout(maps, layers=[1])
    expected = 0.5 * softmax_maps(maps.layers[1].q, maps.layers[1].k).mean(1)[:, 0, 1:]
    torch.testing.assert_close(alone.values.flatten(1), expected)
    for same in (slice(1, 2), "blocks.1.attn", -1):
        torch.testing.assert_close(rollout(maps, layers=same).values, alone.values)
    with pytest.raises(ValueError, match="head_fusion must be one of mean, max, min; got 'sum'"):
        rollout(maps, head_fusion="sum")
    with pytest.raises(ValueError, match="layer 2 does not exist"):
        rollout(maps, layers=[0, 2])


@pytest.mark.parametrize("name", ["timm_vit", "timm_dinov2_registers", "timm_eva02"])
def test_gradient_methods_equal_eager_autograd(name):
    """Fused forward and backward equal whole matrices and gradients of eager weights."""
    model, eager, images, target = exact(name)
    prefix = NAMED[name].last[3]
    alphas, gradients, _ = attached_weights(eager, images, target)

    def read(full):
        row = full[:, prefix:].mean(1) if name == "timm_eva02" else full[:, 0]
        return row[:, prefix:].float()

    expected = {
        "gae": full_gae(alphas, gradients),
        "grad_rollout": full_grad_rollout(alphas, gradients),
        "grad_attention": torch.relu(alphas[-1] * gradients[-1]).mean(1),
    }
    for method, full in expected.items():
        heat = explain(model, images, target, method)
        torch.testing.assert_close(
            heat.values.flatten(1), read(full), rtol=1e-5, atol=0, msg=f"{name} {method}"
        )
        assert torch.equal(heat.target, target)


def test_gae_gives_the_share_of_prefix_tokens():
    model, eager, images, target = exact("timm_dinov2_registers")
    row = full_gae(*attached_weights(eager, images, target)[:2])[:, 0]
    share = row[:, :5].sum(1) / row.sum(1)
    torch.testing.assert_close(explain(model, images, target).prefix_mass, share.float())


@pytest.mark.parametrize("name", ["timm_vit", "timm_dinov2_registers", "torchvision_vit"])
def test_legrad_equals_one_backward_pass_per_layer(name):
    model, eager, images, target = exact(name)
    prefix = NAMED[name].last[3]
    model_blocks = eager.blocks if hasattr(eager, "blocks") else eager.encoder.layers
    total = 0
    for layer in range(2):
        shortened = copy.deepcopy(eager)
        kept = shortened.blocks if hasattr(shortened, "blocks") else shortened.encoder.layers
        for later in range(layer + 1, len(model_blocks)):
            kept[later] = nn.Identity()
        for module in shortened.modules():
            if isinstance(module, nn.MultiheadAttention):
                module.register_forward_pre_hook(
                    lambda m, a, k: (a, k | {"need_weights": True, "average_attn_weights": False}),
                    with_kwargs=True,
                )
        _, gradients, _ = attached_weights(shortened, images, target)
        gradient = gradients[layer]
        gradient = gradient if gradient.ndim == 4 else gradient.unflatten(0, (2, -1))
        total = total + gradient.clamp(min=0).mean((1, 2))[:, prefix:]
    heat = explain(model, images, target, "legrad")
    torch.testing.assert_close(heat.values.flatten(1), total.float(), rtol=1e-5, atol=0)


WINDOWED = {
    "timm_swin": [(4, 0, False), (4, 2, False)] * 2,
    "timm_swin_padded": [(4, 0, False), (4, 2, False)] * 2,
    "torchvision_swin": [(3, 0, True), (3, 1, True)] * 2,
    "hf_swin": [(4, 0, True), (4, 2, True)] * 2,
}


@pytest.mark.parametrize("name", WINDOWED)
def test_windows_are_stitched(name):
    """Rollout and GAE through windows, shifts and merging equal dense matrices."""
    model, eager, images, target = exact(name)
    family = NAMED[name]
    if name == "hf_swin":
        inner, eager = eager, lambda x: inner(x).logits
    alphas, gradients, _ = attached_weights(eager, images, target)
    fine, coarse = family.first[2], family.last[2]
    grids = [fine, fine, coarse, coarse]
    merge = merge_matrix(coarse, fine)

    def dense(weights, layer):
        window, shift, pad_first = WINDOWED[name][layer]
        grid = grids[layer]
        return dense_from_groups(
            weights[layer], grid, lambda y, x: window_place(y, x, grid, window, shift, pad_first)
        )

    start = torch.full((2, 1, math.prod(coarse)), 1 / math.prod(coarse), dtype=torch.double)
    row = start
    for layer in (3, 2, 1, 0):
        row = 0.5 * row + 0.5 * row @ dense(alphas, layer)
        row = row @ merge if layer == 2 else row
    heat = explain(model, images, method="rollout")
    torch.testing.assert_close(heat.values.flatten(1), row[:, 0].float(), atol=1e-8, rtol=1e-5)
    if "padding_mass" in heat.notes:
        torch.testing.assert_close(
            heat.notes["padding_mass"].float(), 1 - heat.values.sum((1, 2)), atol=1e-6, rtol=0
        )

    positive = [torch.relu(a * g) for a, g in zip(alphas, gradients, strict=True)]
    row = start
    added = torch.zeros_like(start)
    for layer in (3, 2, 1, 0):
        added = added + (row + added) @ dense(positive, layer)
        if layer == 2:
            row = row @ merge
            added = added @ merge
    heat = explain(model, images, target, "gae")
    torch.testing.assert_close(heat.values.flatten(1), added[:, 0].float(), atol=1e-12, rtol=1e-5)


@torch.no_grad()
def test_maxvit_windows_and_grids_are_stitched():
    for name in ("torchvision_maxvit", "timm_maxvit"):
        model, images = built(NAMED[name])
        set_fused(model, False)
        with eager_weights(model) as weights:
            model(images)
        fine, coarse = NAMED[name].first[2], NAMED[name].last[2]
        size = math.isqrt(weights[0].shape[-1])
        row = torch.full((2, 1, math.prod(coarse)), 1 / math.prod(coarse))
        for layer in (3, 2, 1, 0):
            grid = coarse if layer > 1 else fine
            inside = partial(window_place, grid=grid, window=size, shift=0, pad_first=True)
            place = partial(grid_place, grid=grid, parts=size) if layer % 2 else inside
            alpha = weights[layer].flatten(0, weights[layer].ndim - 4)
            row = 0.5 * row + 0.5 * row @ dense_from_groups(alpha, grid, place)
            row = row @ merge_matrix(coarse, fine).float() if layer == 2 else row
        heat = explain(model, images, method="rollout")
        torch.testing.assert_close(heat.values.flatten(1), row[:, 0], atol=1e-7, rtol=1e-4)


@torch.no_grad()
def test_rollout_where_tokens_change():
    """A pool starts the row; late class tokens leave patches alone; few keys share their mass."""
    model, images = built(NAMED["timm_siglip"])
    set_fused(model, False)
    with eager_weights(model) as weights:
        model(images)
    row = weights[2].mean(1) @ full_rollout(weights[:2])
    torch.testing.assert_close(
        explain(model, images, method="rollout").values.flatten(1), row[:, 0]
    )

    model, images = built(NAMED["timm_cait"])
    set_fused(model, False)
    with eager_weights(model) as weights:
        model(images)
    trunk = [F.pad(alpha.mean(1), (1, 0, 1, 0)) for alpha in weights[:2]]
    late = [F.pad(alpha.mean(1), (0, 0, 0, 15)) for alpha in weights[2:]]
    eye, product = torch.eye(16), torch.eye(16)
    for alpha in trunk:
        product = (0.5 * alpha + 0.5 * eye + 0.5 * torch.diag(eye[0])) @ product
    for alpha in late:
        product = (0.5 * alpha + 0.5 * eye + 0.5 * (eye - torch.diag(eye[0]))) @ product
    heat = explain(model, images, method="rollout")
    torch.testing.assert_close(heat.values.flatten(1), product[:, 0, 1:])
    torch.testing.assert_close(heat.prefix_mass, product[:, 0, 0])

    model, images = built(NAMED["timm_pvtv2"])
    set_fused(model, False)
    with eager_weights(model) as weights:
        model(images)
    grids = [(16, 24), (8, 12), (4, 6), (2, 3)]
    row = torch.full((2, 1, 6), 1 / 6)
    for layer in (3, 2, 1, 0):
        grid = grids[layer]
        times = grid[0] // 2
        moved = (row @ weights[layer].mean(1)).view(2, 2, 3)
        children = moved.repeat_interleave(times, 1).repeat_interleave(times, 2) / times**2
        row = 0.5 * row + 0.5 * children.flatten(1)[:, None]
        row = row @ merge_matrix(grid, grids[layer - 1]).float() if layer else row
    torch.testing.assert_close(
        explain(model, images, method="rollout").values.flatten(1), row[:, 0]
    )


def test_mass_is_spread_to_children_and_summed_from_them():
    patches = torch.rand(2, 3, 4, dtype=torch.double)
    for grid in ((6, 8), (9, 4), (5, 7), (2, 3), (1, 1), (7, 9)):
        moved = spread(patches, grid)
        assert moved.shape == (2, *grid)
        torch.testing.assert_close(moved.sum((1, 2)), patches.sum((1, 2)))
    torch.testing.assert_close(
        spread(patches, (6, 8)), patches.repeat_interleave(2, 1).repeat_interleave(2, 2) / 4
    )
    torch.testing.assert_close(spread(spread(patches, (6, 8)), (3, 4)), patches)
    # Merging pads an odd side: the last parent has one child.
    column = patches[0, [0, 0, 1, 1, 2], 0] / torch.tensor([2, 2, 2, 2, 1])
    torch.testing.assert_close(spread(patches[:, :, :1], (5, 1))[0, :, 0], column)


@torch.no_grad()
def test_glimpses_are_averaged():
    class Glimpses(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Conv2d(3, 12, 4, 4)
            self.look = RELATIONS["cross"](12, 3)

        def forward(self, images):
            features = self.embed(images).flatten(2).transpose(1, 2)
            state = torch.zeros(len(images), 1, 12)
            for _ in range(3):
                state = state + self.look(state, features)
            return state[:, 0]

    torch.manual_seed(0)
    model, images = Glimpses().eval(), torch.randn(2, 3, 12, 20)
    with capture(model) as maps:
        model(images)
    assert [record.name for record in maps.layers] == ["look[0]", "look[1]", "look[2]"]
    expected = torch.stack([softmax_maps(r.q, r.k).mean(1)[:, 0] for r in maps.layers]).mean(0)
    torch.testing.assert_close(rollout(maps).values.flatten(1), expected)


@torch.no_grad()
def test_dino_masks_hold_their_mass():
    model, images = built(NAMED["timm_vit"])
    with capture(model) as maps:
        model(images)
    for head in range(3):
        mask = dino(maps, head=head, mass=0.6).values
        values = maps.map(head=head).values
        for b in range(2):
            ordered = sorted(values[b].flatten().tolist(), reverse=True)
            count = 0
            while sum(ordered[:count]) < 0.6 * sum(ordered):
                count += 1
            assert mask[b].sum() == count
            assert values[b][mask[b] > 0].min() > values[b][mask[b] == 0].max()
    masks = torch.stack([dino(maps, head=head).values for head in range(3)])
    torch.testing.assert_close(dino(maps).values, masks.mean(0))
    torch.testing.assert_close(
        raw(maps, layers=slice(None)).values, (maps.map(0).values + maps.map(1).values) / 2
    )
