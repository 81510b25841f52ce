"""What the token blocks promise beyond the contract: exact sparse evaluation, and maps that lie where they belong."""

import pytest
import torch

from visattn.blocks.catalog import create_block
from visattn.blocks.non_local import halve
from visattn.blocks.parts.shifts import weighted_shifts
from visattn.core.attention.criss_cross import CrissCrossAttend
from visattn.core.formula import attend, attention_map
from visattn.core.layout import CrissCross, Windows
from visattn.core.normalize import NORMALIZERS
from visattn.core.similarity import SIMILARITIES
from visattn.record import capture


def image(*size, seed=0, dtype=torch.float32):
    return torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize("grid", [(3, 5), (1, 5), (5, 1), (1, 1)])
@pytest.mark.parametrize(
    ("similarity", "normalize"), [("dot", "softmax"), ("negative_l2", "sparsemax")]
)
def test_the_cross_equals_the_masked_definition(grid, similarity, normalize):
    layout, tokens = CrissCross(grid), grid[0] * grid[1]
    pair = SIMILARITIES[similarity](4, 2), NORMALIZERS[normalize](2)
    q, k, v = (
        image(2, 2, tokens, width, seed=i, dtype=torch.float64) for i, width in enumerate((4, 4, 7))
    )
    mine = CrissCrossAttend(*pair)(q.requires_grad_(), k, v, layout=layout)
    (gradient,) = torch.autograd.grad(mine.square().sum(), q)
    wanted = attend(q, k, v, *pair, mask=layout.meets(), impl="dense")
    torch.testing.assert_close(mine, wanted)
    torch.testing.assert_close(gradient, torch.autograd.grad(wanted.square().sum(), q)[0])


CROSS = CrissCross((3, 5))
ANYTHING_ELSE = {
    "a bias": {"bias": image(1, 2, 15, 15, seed=5, dtype=torch.float64)},
    "a mask by query": {"mask": image(1, 1, 15, 15, seed=6) > -1},
    "a mask over keys": {"mask": image(2, 1, 1, 15, seed=7) > -0.5},
    "every key of an image masked": {"mask": torch.tensor([True, False])[:, None, None, None]},
}


@pytest.mark.parametrize("pair", [("dot", "softmax"), ("laplacian", "softmax1"), ("dot", "sinkhorn")])
@pytest.mark.parametrize("case", ANYTHING_ELSE)
def test_the_cross_serves_everything(case, pair):
    arguments = dict(ANYTHING_ELSE[case])
    if "mask" in arguments:
        arguments["mask"] = arguments["mask"].expand(-1, -1, -1, 15)
    q, k, v = (
        image(2, 2, 15, width, seed=i, dtype=torch.float64) for i, width in enumerate((4, 4, 7))
    )
    objects = SIMILARITIES[pair[0]](4, 2), NORMALIZERS[pair[1]](2)
    meets = CROSS.meets()
    mask = meets & arguments["mask"] if "mask" in arguments else meets
    attends = CrissCrossAttend(*objects)
    expected = attention_map(q, k, *objects, mask=mask, bias=arguments.get("bias")) @ v
    torch.testing.assert_close(attends(q, k, v, layout=CROSS, **arguments), expected)
    plan = attends.plan(q, k, v, layout=CROSS, **arguments)
    lines = pair[1] != "sinkhorn" and case not in ("a bias", "a mask by query")
    assert (plan.impl == "criss_cross") == lines
    assert lines or "under the N x N mask of the cross, since" in plan.why


def test_the_cross_needs_its_layout():
    x = image(1, 1, 6, 4)
    for layout in (None, Windows((2, 3), (1, 3))):
        with pytest.raises(ValueError, match="layout must be a CrissCross"):
            CrissCrossAttend()(x, x, x, layout=layout)


def test_a_cross_is_seen_as_a_cross():
    block, x = create_block("criss_cross", 8, recurrence=1).eval(), image(1, 8, 3, 4)
    with capture(block) as maps:
        block(x)
    row = maps.map(query=(1, 2)).values[0]
    inside = torch.zeros(3, 4, dtype=torch.bool)
    inside[1], inside[:, 2] = True, True
    assert (row[inside] > 0).all() and (row[~inside] == 0).all()
    torch.testing.assert_close(row.sum(), torch.tensor(1.0))


def test_a_kernel_is_seen_around_its_position():
    block, x = (
        create_block("involution", 8, group_channels=8, kernel_size=3).eval(),
        image(1, 8, 3, 4),
    )
    found = []
    block.tap.register_forward_hook(lambda module, inputs, alpha: found.append(alpha))
    with capture(block) as maps:
        block(x)
    kernel = found[0][0, 0, 4].view(
        3, 3
    )  # row 1, column 0: the left column of the kernel lies outside
    row = maps.map(query=(1, 0)).values[0]
    torch.testing.assert_close(row[:, :2], kernel[:, 1:])
    assert (row[:, 2:] == 0).all()


def test_outlook_rows_sum_to_one_inside():
    block, x = create_block("outlook", 8, num_heads=2).eval(), image(1, 8, 5, 6)
    with capture(block) as maps:
        block(x)
    assert maps.map(query=(2, 3)).values.shape == (1, 5, 6)
    assert (
        maps.map(query="mean").values.sum() > 1
    )  # a position has a query in each of the windows around it


@pytest.mark.parametrize(("height", "width"), [(4, 6), (5, 3), (1, 1)])
def test_halving_is_max_pooling(height, width):
    x = image(2, 3, height, width)
    torch.testing.assert_close(halve(x), torch.nn.functional.max_pool2d(x, 2, ceil_mode=True))


def test_equal_weights_count_neighbors():
    v = torch.ones(1, 4, 3, 3)
    y = weighted_shifts(v, torch.ones(1, 2, 1, 9, 3, 3), 3)
    assert y[0, 0].tolist() == [[4, 6, 4], [6, 9, 6], [4, 6, 4]] and y.shape == v.shape


def test_inverted_channel_attention_attends_the_least_alike():
    x = image(1, 6, 4, 5)
    for inverted in (False, True):
        block = create_block("cam", 6, inverted=inverted).eval()
        with capture(block, keep="maps") as maps:
            block(x)
        alpha = maps.layers[0].alpha[0, 0]
        likeness = x[0].flatten(1) @ x[0].flatten(1).T
        best = likeness.argmin(1) if inverted else likeness.argmax(1)
        assert torch.equal(alpha.argmax(1), best)


def test_no_weight_is_denormal():
    block, x = create_block("cam", 64, inverted=True).eval(), image(1, 64, 14, 14)
    with capture(block, keep="maps") as maps:
        block(x)
    alpha = maps.layers[0].alpha
    assert ((alpha == 0) | (alpha >= 1e-30)).all() and (alpha == 0).any()
    torch.testing.assert_close(alpha.sum(-1), torch.ones_like(alpha.sum(-1)))


def test_non_local_forms_no_matrix():
    """2,500 positions: a matrix would be 25 MB a head; nothing so large is saved for the gradient."""
    block, x = create_block("non_local", 4), image(2, 4, 50, 50)
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: sizes.append(t.numel()) or t, lambda t: t
    ):
        block(x)
    assert max(sizes) < 2500 * 100
