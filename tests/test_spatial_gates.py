"""What the contract of the blocks does not ask of the gates over positions and strips."""

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.nn import functional as F

from visattn.blocks.plane_conv import PlaneConv
from visattn.blocks.pool import axis_max
from visattn.blocks.reference import load_reference
from visattn.blocks.table import create_block

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


def test_simam_has_second_derivatives():
    block, x = create_block("simam", 3), normal(2, 3, 2, 4, dtype=torch.float64).requires_grad_()
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
    weights = {"conv.weight": normal(12, 1, 5), "gn.weight": normal(12, seed=1), "gn.bias": normal(12, seed=2)}
    block = load_reference(create_block("ela", 12, groups=3, kernel_size=5), weights, "shared")
    x = normal(2, 12, 7, 4)

    def strip(z):
        z = F.conv1d(z, weights["conv.weight"], padding=2, groups=12)
        return F.group_norm(z, 3, weights["gn.weight"], weights["gn.bias"]).sigmoid()

    torch.testing.assert_close(block(x), x * strip(x.mean(3))[..., None] * strip(x.mean(2))[:, :, None])


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


@pytest.mark.parametrize("axis", [1, 2, 3, (2, 3)], ids=str)
@pytest.mark.parametrize("size", [(5, 8), (1, 1), (7, 3)], ids=str)
def test_axis_max_is_amax(axis, size):
    x = normal(2, 3, *size, dtype=torch.float64).requires_grad_()
    torch.testing.assert_close(axis_max(x, axis), x.amax(axis, keepdim=True), rtol=0, atol=0)
    torch.testing.assert_close(axis_max(x.detach(), axis), x.amax(axis, keepdim=True).detach(), rtol=0, atol=0)
    assert gradcheck(lambda x: axis_max(x, axis), (x,), fast_mode=True)


def test_plane_conv_is_a_convolution():
    conv, x = PlaneConv(2, 5).double(), normal(3, 2, 7, 11, dtype=torch.float64).requires_grad_()
    torch.testing.assert_close(conv(x), F.conv2d(x, conv.weight, padding=2))
    assert gradcheck(conv, (x,), fast_mode=True)
