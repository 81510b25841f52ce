"""The contract of the relations and their layouts."""

import copy
import io
import pickle

import numpy as np
import pytest
import torch
from core_cases import make_normalizer, make_similarity
from relation_cases import (
    DIM,
    GRID,
    HEADS,
    RELATION_CASES,
    TOKENS,
    attend_slowly,
    build,
    call,
    numbers,
    relation_slowly,
)

from visattn.core.attention import RELATIONS
from visattn.core.formula import Attend, attention_map
from visattn.core.layout import Channels, CrissCross, Grid, Neighborhood, Windows, strips
from visattn.core.normalize import NORMALIZERS
from visattn.core.similarity import SIMILARITIES

EXACT = {"rtol": 1e-10, "atol": 1e-10}
PAIRS = [(similarity, normalizer) for similarity in SIMILARITIES for normalizer in NORMALIZERS]
every_relation = pytest.mark.parametrize("name", RELATIONS)


def grads(module, x, out):
    inputs = [x, *module.parameters()]
    return torch.autograd.grad(
        (out * numbers(*out.shape, seed=99)).sum(), inputs, allow_unused=True
    )


def test_every_relation_has_its_case():
    assert set(RELATIONS) == set(RELATION_CASES)


@pytest.mark.parametrize("name", [name for name, case in RELATION_CASES.items() if case.meets])
def test_relation_equals_its_twin(name):
    module, x = build(name), numbers(2, TOKENS, DIM)
    y = call(name, module, x).detach().numpy()
    for b in (0, 1):
        np.testing.assert_allclose(
            y[b], relation_slowly(module, x[b].numpy(), RELATION_CASES[name].meets), atol=1e-10
        )


def test_axial_goes_through_columns_then_rows():
    module, x = build("axial"), numbers(1, TOKENS, DIM)
    y = relation_slowly(module.height, x[0].numpy(), lambda a, b: a[1] == b[1])
    y = relation_slowly(module.width, y, lambda a, b: a[0] == b[0])
    np.testing.assert_allclose(module(x, grid=GRID)[0].detach().numpy(), y, atol=1e-10)


def test_cross_equals_its_twin():
    module, x, c = build("cross"), numbers(1, 7, DIM), numbers(1, 11, DIM, seed=1)
    w = {key: value.numpy() for key, value in module.state_dict().items()}
    q = x[0].numpy() @ w["q.weight"].T + w["q.bias"]
    k, v = np.split(c[0].numpy() @ w["kv.weight"].T + w["kv.bias"], 2, axis=1)
    heads = [slice(4 * h, 4 * h + 4) for h in range(HEADS)]
    m = np.concatenate(
        [attend_slowly(q[:, h], k[:, h], v[:, h], lambda i, j: True) for h in heads], 1
    )
    got = module(x, c)[0].detach().numpy()
    np.testing.assert_allclose(got, m @ w["proj.weight"].T + w["proj.bias"], atol=1e-10)


@pytest.mark.parametrize("name", ["self", "cross", "window"])
@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
def test_every_pair_equals_the_definition(name, pair):
    f_sim, f_norm = make_similarity(pair[0], DIM // HEADS, HEADS), make_normalizer(pair[1], HEADS)
    size = {"window_size": (5, 7)} if name == "window" else {}
    module, x = build(name, f_sim, f_norm, **size), numbers(2, TOKENS, DIM).requires_grad_()
    got = call(name, module, x)
    got_grads = grads(module, x, got)
    module.attend.impl = "dense"
    expected = call(name, module, x)
    torch.testing.assert_close(got, expected, **EXACT)
    torch.testing.assert_close(got_grads, grads(module, x, expected), rtol=1e-8, atol=1e-9)


@every_relation
@pytest.mark.parametrize("normalizer", NORMALIZERS)
def test_masked_tokens_have_no_say(name, normalizer):
    """Whatever a masked token is, no other token's output changes."""
    module, x = build(name, None, make_normalizer(normalizer, HEADS)), numbers(2, TOKENS, DIM)
    mask = torch.ones(2, TOKENS, dtype=torch.bool)
    mask[0, 3], mask[1, [8, 20, 34]] = False, False
    if name == "pool":
        mask[0, 0] = False
    other = torch.where(mask[..., None], x, numbers(2, TOKENS, DIM, seed=7))
    if name == "cross":
        a, b = module(x, x, mask=mask), module(x, other, mask=mask)
        mask = torch.ones_like(mask)
    else:
        a, b = call(name, module, x, mask=mask), call(name, module, other, mask=mask)
    seen = mask if a.shape[1] == TOKENS else torch.ones(a.shape[:2], dtype=torch.bool)
    torch.testing.assert_close(a[seen], b[seen], **EXACT)
    if normalizer == "softmax":
        assert not torch.allclose(call(name, module, x)[0], call(name, module, other)[0])


@pytest.mark.parametrize("normalizer", NORMALIZERS)
@pytest.mark.parametrize("name", ["self", "cross", "class", "pool", "memory"])
def test_masked_is_the_shorter_problem(name, normalizer):
    module, x = build(name, None, make_normalizer(normalizer, HEADS)), numbers(2, 11, DIM)
    mask = torch.arange(11).expand(2, -1) < 7
    masked, short = module(x, mask=mask), module(x[:, :7])
    if name == "cross":
        short = module(x, x[:, :7])
    torch.testing.assert_close(masked[:, : short.shape[1]], short, **EXACT)


@pytest.mark.parametrize("normalizer", NORMALIZERS)
@pytest.mark.parametrize("name", ["window", "shifted_window", "grid"])
def test_groups_do_not_see_padding(name, normalizer):
    """Every group is self-attention of its tokens alone, though most groups of this grid are padded."""
    module, alone = (build(n, None, make_normalizer(normalizer, HEADS)) for n in (name, "self"))
    alone.load_state_dict(module.state_dict())
    place = [(y, x) for y in range(GRID[0]) for x in range(GRID[1])]
    x = numbers(2, TOKENS, DIM)
    y = module(x, grid=GRID)
    for first in place:
        group = [i for i, other in enumerate(place) if RELATION_CASES[name].meets(first, other)]
        torch.testing.assert_close(y[:, group], alone(x[:, group]), **EXACT)


@pytest.mark.parametrize("name", [name for name, case in RELATION_CASES.items() if case.grid])
@pytest.mark.parametrize("normalizer", ["softmax", "double", "sigmoid"])
@pytest.mark.parametrize("grid", [(1, 1), (1, 13), (6, 6), (11, 3)])
def test_any_grid(name, normalizer, grid):
    module = build(name, None, make_normalizer(normalizer, HEADS))
    y = module(numbers(2, grid[0] * grid[1], DIM), grid=grid)
    assert y.shape == (2, grid[0] * grid[1], DIM) and y.isfinite().all()


@pytest.mark.parametrize(
    "name", [name for name, case in RELATION_CASES.items() if case.takes_context]
)
def test_context(name):
    module, x, c = build(name), numbers(2, TOKENS, DIM), numbers(2, 11, DIM, seed=1)
    expected = module(torch.cat([x, c], 1)) if name == "pool" else module(x, c)
    assert not torch.equal(module(x, c), module(x))
    torch.testing.assert_close(module(x, c), expected, **EXACT)


@every_relation
def test_shape_dtype_and_repeat(name):
    module, x = build(name).float(), numbers(2, TOKENS, DIM, dtype=torch.float32)
    before = x.clone()
    y = call(name, module, x)
    assert y.shape == (2, RELATION_CASES[name].tokens_out, DIM) and y.dtype == torch.float32
    assert torch.equal(y, call(name, module, x)) and torch.equal(x, before)
    torch.testing.assert_close(call(name, module, x[:1]), y[:1], rtol=1e-5, atol=1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        half = call(name, module, x)
    torch.testing.assert_close(half.float(), y, rtol=0.1, atol=0.1)


@every_relation
def test_every_parameter_learns(name):
    module, x = build(name), numbers(2, TOKENS, DIM).requires_grad_()
    out = call(name, module, x)
    for (key, _), gradient in zip(
        [("x", x), *module.named_parameters()], grads(module, x, out), strict=True
    ):
        assert gradient is not None and gradient.isfinite().all() and gradient.any(), key


@every_relation
def test_gradcheck(name):
    module, x = build(name), numbers(1, TOKENS, DIM).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: call(name, module, x), x, fast_mode=True)


@every_relation
def test_copies(name):
    module, x = build(name), numbers(2, TOKENS, DIM)
    y = call(name, module, x)
    fresh = build(name)
    fresh.load_state_dict(module.state_dict())
    for twin in (copy.deepcopy(module), pickle.load(io.BytesIO(pickle.dumps(module))), fresh):
        assert torch.equal(call(name, twin, x), y)


@every_relation
def test_meta_device(name):
    module = build(name).to("meta")
    assert call(
        name, module, torch.empty(2, TOKENS, DIM, dtype=torch.float64, device="meta")
    ).is_meta


@every_relation
def test_map_times_values_is_the_output(name):
    """What an Attend got is enough for its map, and with the map the output is given."""
    module, x, seen = build(name), numbers(2, TOKENS, DIM), []
    attends = [m for m in module.modules() if isinstance(m, Attend)]
    hooks = [
        m.register_forward_hook(lambda m, i, k, o: seen.append((m, i, k, o)), with_kwargs=True)
        for m in attends
    ]
    y = call(name, module, x)
    assert len(seen) == RELATION_CASES[name].maps
    for attend, (q, k, v), given, m in seen:
        layout, mask = given.get("layout"), given.get("mask")
        if isinstance(layout, CrissCross):  # rows and columns are scored apart, without a mask
            mask = layout.meets() if mask is None else layout.meets() & mask
        alpha = attention_map(
            q,
            k,
            attend.similarity,
            attend.normalize,
            bias=given.get("bias"),
            mask=mask,
        )
        torch.testing.assert_close(alpha @ v, m, **EXACT)
        if layout is not None and layout.kind == "token":
            assert len(q) == 2 * len(layout.token_index())
            assert alpha.shape[2:] == (layout.token_index().shape[1], layout.key_index().shape[1])
    for hook in hooks:
        hook.remove()
    zero = attends[-1].register_forward_hook(lambda m, i, o: torch.zeros_like(o))
    assert not torch.allclose(call(name, module, x), y)
    zero.remove()


@every_relation
def test_refusals(name):
    with pytest.raises(TypeError, match="similarity must be an object, such as SIMILARITIES"):
        RELATIONS[name](DIM, HEADS, similarity="cosine")
    with pytest.raises(TypeError, match="normalize must be an object, such as NORMALIZERS"):
        RELATIONS[name](DIM, HEADS, normalize="softmax")
    for option, (value, message) in RELATION_CASES[name].refused.items():
        options = {"num_heads": HEADS, option: value}
        with pytest.raises(ValueError, match=message):
            RELATIONS[name](DIM, **options)
    if RELATION_CASES[name].grid:
        with pytest.raises(ValueError, match="grid must be given"):
            build(name)(numbers(2, TOKENS, DIM))
        with pytest.raises(ValueError, match="x must have the 5 x 7 tokens of its grid"):
            build(name)(numbers(2, 1 + TOKENS, DIM), grid=GRID)
        with pytest.raises(ValueError, match=r"mask must be \(B, N\)"):
            build(name)(
                numbers(2, TOKENS, DIM),
                grid=GRID,
                mask=torch.ones(TOKENS, TOKENS, dtype=torch.bool),
            )


@every_relation
def test_compiles_whole(name):
    torch.compiler.reset()
    module, x = build(name), numbers(2, TOKENS, DIM)
    compiled = torch.compile(lambda x: call(name, module, x), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), call(name, module, x), **EXACT)


@every_relation
def test_exports_with_any_batch(name):
    class Whole(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.relation = build(name)

        def forward(self, x):
            return call(name, self.relation, x)

    whole = Whole()
    program = torch.export.export(
        whole,
        (numbers(2, TOKENS, DIM),),
        dynamic_shapes=({0: torch.export.Dim.DYNAMIC},),
        strict=False,
    )
    x = numbers(3, TOKENS, DIM, seed=1)
    torch.testing.assert_close(program.module()(x), whole(x), **EXACT)


LAYOUTS = [
    Windows(GRID, (3, 3)),
    Windows(GRID, (3, 2), (1, 1)),
    Windows(GRID, (9, 9), (4, 4)),
    Grid(GRID, (3, 3)),
    strips(GRID, "height"),
    strips(GRID, "width"),
    CrissCross(GRID),
    Neighborhood(GRID, (3, 3)),
    Neighborhood(GRID, (3, 9)),
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_layout_folds_back(layout):
    x = numbers(2, TOKENS, 3)
    folded, index = layout.fold(x), layout.token_index()
    assert torch.equal(layout.unfold(folded), x)
    assert sorted(i for i in index.flatten().tolist() if i >= 0) == list(range(TOKENS))
    for fold, where in ((layout.fold, index), (layout.fold_keys, layout.key_index())):
        expected = torch.where(where[..., None] >= 0, x[:, where.clamp(min=0)], 0.0)
        assert torch.equal(fold(x).unflatten(0, (2, -1)), expected)
    coordinates = layout.coordinates()
    assert coordinates.queries.amax((0, 1)).tolist() < list(
        coordinates.extent
    ) or coordinates.extent == (1, 1)


def test_channels_fold_back():
    x = numbers(2, 3, 7, 5)
    assert torch.equal(Channels().unfold(Channels().fold(x)), x)


def test_neighborhood_keeps_its_size_everywhere():
    layout = Neighborhood((11, 13), (5, 3))
    real = layout.token_index() >= 0
    assert layout.meets()[:, 0].sum(-1)[real].unique().tolist() == [15]
