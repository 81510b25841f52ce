"""What the contract of the blocks does not ask of the gates over positions and strips."""

import math

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.func import functional_call
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

from visattn.blocks.catalog import create_block
from visattn.blocks.parts import products
from visattn.blocks.parts.norm import BatchNorm
from visattn.blocks.parts.plane_conv import PlaneConv
from visattn.blocks.parts.pool import max_and_mean
from visattn.blocks.parts.products import contracted, product, scaled, scaled_by_sum
from visattn.blocks.reference import load_reference

STATISTICAL = [("simam", {}), ("shuffle", {"groups": 3}), ("sge", {"groups": 3}), ("mca", {})]


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def built(name, channels, **options):
    """A block with random parameters in evaluation mode."""
    block = create_block(name, channels, **options).eval()
    for index, parameter in enumerate(block.parameters()):
        torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(index))
    return block


@pytest.mark.parametrize(("name", "options"), STATISTICAL, ids=str)
def test_deviations_do_not_cancel_far_from_zero(name, options):
    block, x = built(name, 12, **options), normal(2, 12, 7, 11) + 1000
    exact = built(name, 12, **options).double()(x.double())
    assert ((block(x) - exact).abs() / x).max() < 1e-3


@pytest.mark.parametrize(("name", "options"), STATISTICAL, ids=str)
@pytest.mark.parametrize("size", [(7, 11), (1, 1)], ids=str)
def test_gradient_is_finite_where_nothing_varies(name, options, size):
    x = torch.full((2, 12, *size), 3.0, requires_grad=True)
    built(name, 12, **options)(x).square().sum().backward()
    assert x.grad.isfinite().all() and x.grad.abs().max() > 0


@pytest.mark.parametrize(
    "name", ["simam", "bam", "coord", "gc", "polarized", "a2", "pam", "se", "eca"]
)
def test_gradients_have_gradients(name):
    block = built(name, 4).double().train(name != "bam")  # in training its norm magnifies rounding
    x = normal(2, 4, 3, 5, dtype=torch.float64).requires_grad_()
    assert gradgradcheck(block, (x,), fast_mode=True)


def test_simam_gate_is_lowest_at_the_mean():
    x = normal(1, 1, 5, 5)
    x[0, 0, 2, 3] = (x.sum() - x[0, 0, 2, 3]) / 24
    block, gates = create_block("simam", 1), []
    block.tap.register_forward_hook(lambda module, args, gate: gates.append(gate))
    block(x)
    assert gates[0].argmin() == 2 * 5 + 3 and gates[0].min() >= torch.tensor(0.5).sigmoid()


def test_shuffle_interleaves_the_halves():
    block = create_block("shuffle", 12, groups=3)
    block.tap.register_forward_hook(lambda module, args, gate: torch.ones_like(gate))
    x = normal(2, 12, 5, 3)
    order = [0, 6, 1, 7, 2, 8, 3, 9, 4, 10, 5, 11]
    torch.testing.assert_close(block(x), x[:, order], rtol=0, atol=0)


def test_fusion_of_a_map_with_itself_is_that_map():
    x = normal(2, 12, 5, 3)
    for name in ("aff", "iaff"):
        torch.testing.assert_close(create_block(name, 12)(x, x), x)


def test_shared_strips_of_ela_load_into_both():
    weights = {
        "conv.weight": normal(12, 1, 5),
        "gn.weight": normal(12, seed=1),
        "gn.bias": normal(12, seed=2),
    }
    block = load_reference(create_block("ela", 12, groups=3, kernel_size=5), weights, "shared")
    x = normal(2, 12, 7, 4)

    def strip(z):
        z = F.conv1d(z, weights["conv.weight"], padding=2, groups=12)
        return F.group_norm(z, 3, weights["gn.weight"], weights["gn.bias"]).sigmoid()

    torch.testing.assert_close(
        block(x), x * strip(x.mean(3))[..., None] * strip(x.mean(2))[:, :, None]
    )


AUTHORS = {  # our module -> the authors' name of it, for blocks that no reference vector covers
    "mca": ({}, {"gate_h": "h_cw", "gate_w": "w_hc", "gate_c": "c_hw"}),
    "sge": ({"groups": 4}, {}),
    "lska": (
        {},
        {
            "local_h": "conv0h",
            "local_v": "conv0v",
            "dilated_h": "conv_spatial_h",
            "dilated_v": "conv_spatial_v",
            "mix": "conv1",
        },
    ),
    "strip_pooling": (
        {},
        {
            "reduce_grid": "conv1_1",
            "reduce_strip": "conv1_2",
            "local": "conv2_0",
            "grids.0": "conv2_1",
            "grids.1": "conv2_2",
            "column": "conv2_3",
            "row": "conv2_4",
            "mix_grid": "conv2_5",
            "mix_strip": "conv2_6",
            "expand": "conv3",
        },
    ),
}


@pytest.mark.parametrize("name", AUTHORS)
def test_names_of_the_authors_load(name):
    options, names = AUTHORS[name]
    trained, theirs = built(name, 12, **options), {}
    for key, value in trained.state_dict().items():
        module = next((ours for ours in names if key.startswith(f"{ours}.")), None)
        theirs[key if module is None else names[module] + key[len(module) :]] = value
    ours = load_reference(create_block(name, 12, **options), theirs, "paper").eval()
    x = normal(2, 12, 7, 11)
    torch.testing.assert_close(ours(x), trained(x), rtol=0, atol=0)


@pytest.mark.parametrize("size", [(5, 8), (1, 1), (7, 3)], ids=str)
def test_max_and_mean(size):
    axes, x = ((1,), (2,), (3,), (2, 3)), normal(2, 3, *size, dtype=torch.float64).requires_grad_()
    for given in (x, x.detach()):
        for axis, pooled in zip(axes, max_and_mean(given, *axes), strict=True):
            for own, wanted in zip(pooled, (x.amax(axis, True), x.mean(axis, True)), strict=True):
                torch.testing.assert_close(own, wanted)
    assert gradcheck(lambda x: sum(max_and_mean(x, *axes), ()), (x,), fast_mode=True)


def test_equal_maxima_share_the_gradient_as_for_amax():
    x = torch.tensor([[1.0, 5, 5, 2], [5, 0, 5, 5], [5, 5, 1, 1]], requires_grad=True).view(
        1, 3, 2, 2
    )
    for axis in ((1,), (2,), (3,), (2, 3)):
        weight = normal(*x.amax(axis, True).shape)
        own = torch.autograd.grad(
            (max_and_mean(x, axis)[0][0] * weight).sum(), x, retain_graph=True
        )
        torch.testing.assert_close(own, torch.autograd.grad((x.amax(axis, True) * weight).sum(), x))


GATES = {  # what each gate of a map (2, 3, 5, 4) may look like
    "channel": [(2, 3, 1, 1)],
    "spatial": [(2, 1, 5, 4)],
    "strips": [(2, 3, 5, 1), (2, 3, 1, 4)],
    "planes": [(2, 3, 1, 4), (2, 3, 5, 1), (2, 1, 5, 4)],
    "axes": [(2, 1, 1, 4), (2, 1, 5, 1), (2, 3, 1, 1)],
}


@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("kind", GATES)
def test_a_scaled_map_and_its_gradients(kind, order, monkeypatch):
    monkeypatch.setattr(products, "_BYTES", 1)  # every image a piece of its own
    x = normal(2, 3, 5, 4, dtype=torch.float64).contiguous(memory_format=order).requires_grad_()
    gates = [
        normal(*shape, seed=i, dtype=torch.float64).requires_grad_()
        for i, shape in enumerate(GATES[kind], 1)
    ]
    product = math.prod(gates)
    torch.testing.assert_close(scaled(x, *gates), x * product)
    torch.testing.assert_close(scaled_by_sum(x, *gates), x * sum(gates))
    for function in (scaled, scaled_by_sum):
        assert function(x, *gates).is_contiguous(memory_format=order)
        assert gradcheck(function, (x, *gates), fast_mode=True)
        assert gradgradcheck(function, (x, *gates), fast_mode=True)


def test_a_gate_that_is_not_one_per_image_scales_too():
    x = normal(2, 3, 5, 4).requires_grad_()
    for gate in (normal(1, 1, 5, 4), normal(2, 3, 5, 4), normal(3, 1, 1)):
        torch.testing.assert_close(scaled(x, gate), x * gate, rtol=0, atol=0)


def test_no_gradient_of_a_gate_takes_a_map():
    """A gradient of the map is all of its size that comes into being."""
    x, gate = normal(16, 64, 56, 56).requires_grad_(), normal(16, 64, 1, 1).requires_grad_()
    y, gradient = scaled(x, gate), normal(16, 64, 56, 56)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as taken:
        y.backward(gradient)
    large = [e for e in taken.events() if e.self_cpu_memory_usage >= x.nbytes // 2]
    assert sum(e.self_cpu_memory_usage for e in large) <= x.nbytes


@pytest.mark.parametrize("axis", [1, 2])
def test_contracted(axis):
    x = normal(2, 3, 5, dtype=torch.float64).requires_grad_()
    weights = normal(2, (3, 5)[axis - 1], seed=1, dtype=torch.float64).requires_grad_()
    torch.testing.assert_close(
        contracted(x, weights, axis), (x * weights.unsqueeze(3 - axis)).sum(axis)
    )
    assert gradcheck(lambda x, w: contracted(x, w, axis), (x, weights), fast_mode=True)
    assert gradgradcheck(lambda x, w: contracted(x, w, axis), (x, weights), fast_mode=True)


@pytest.mark.parametrize(
    "turned", [(False, False), (True, False), (False, True), (True, True)], ids=str
)
def test_a_product_gives_gradients_that_lie_as_their_matrices(turned):
    a, b = (normal(2, *shape, dtype=torch.float64) for shape in ((3, 5), (5, 4)))
    a, b = (
        (x.mT.contiguous().mT if turn else x).requires_grad_()
        for x, turn in zip((a, b), turned, strict=True)
    )
    torch.testing.assert_close(product(a, b), a @ b)
    assert gradcheck(product, (a, b), fast_mode=True) and gradgradcheck(
        product, (a, b), fast_mode=True
    )
    seen = []
    a.register_hook(lambda g: seen.append(g.stride()))
    product(a, b).sum().backward()
    assert seen == [a.stride()]


@pytest.mark.parametrize("size", [(7, 5), (1, 1)], ids=str)
def test_batch_norm_trains_as_torch_does(size, monkeypatch):
    monkeypatch.setattr("visattn.blocks.parts.norm._LARGE", 1)
    own, theirs = BatchNorm(3).double(), torch.nn.BatchNorm2d(3).double()
    results = []
    for norm in (own, theirs):
        x = normal(4, 3, *size, dtype=torch.float64).requires_grad_()
        torch.nn.init.constant_(norm.weight, 1.3)
        y = norm(x)
        y.backward(normal(4, 3, *size, seed=1, dtype=torch.float64))
        results.append((y, x.grad, norm.weight.grad, norm.bias.grad, *norm.buffers()))
    torch.testing.assert_close(*results)
    x = normal(4, 3, *size, dtype=torch.float64).requires_grad_()
    assert gradcheck(own, (x,), fast_mode=True) and gradgradcheck(own, (x,), fast_mode=True)


def test_plane_conv_is_a_convolution():
    conv, x = PlaneConv(2, 5).double(), normal(3, 2, 7, 11, dtype=torch.float64).requires_grad_()
    torch.testing.assert_close(conv(x), F.conv2d(x, conv.weight, padding=2))
    names, weights = zip(*conv.named_parameters(), strict=True)

    def run(x, *weights):
        return functional_call(conv, dict(zip(names, weights, strict=True)), (x,))

    assert gradcheck(run, (x, *weights), fast_mode=True) and gradgradcheck(
        run, (x, *weights), fast_mode=True
    )


@pytest.mark.parametrize("name", ["se", "coord", "cbam", "triplet", "non_local", "bam"])
def test_halves_have_gradients_near_those_of_floats(name):
    gradients = []
    for dtype in (torch.float32, torch.bfloat16):
        block, x = built(name, 12).to(dtype).train(), normal(4, 12, 5, 6).to(dtype).requires_grad_()
        block(x).backward(normal(4, 12, 5, 6, seed=1).to(dtype))
        assert x.grad.dtype == dtype
        gradients.append(x.grad.float())
    assert (gradients[0] - gradients[1]).norm() < 0.1 * gradients[0].norm()
