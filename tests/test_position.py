"""Positions: their equations, their layouts, their company, and their agreement with timm."""

import math

import pytest
import torch
from core_cases import make_similarity
from relation_cases import DIM, GRID, HEADS, RELATION_CASES, TOKENS, build, call, numbers
from timm.layers.pos_embed_sincos import apply_rot_embed, build_rotary_pos_embed
from timm.models.vision_transformer_sam import get_decomposed_rel_pos_bias

from visattn.core.attention import RELATIONS
from visattn.core.formula import attention_map
from visattn.core.normalize import NORMALIZERS
from visattn.core.position import POSITIONS, grid_coordinates
from visattn.core.similarity import SIMILARITIES

WIDTH, PREFIX = DIM // HEADS, 2
EXACT = {"rtol": 1e-10, "atol": 1e-10}
every_position = pytest.mark.parametrize("name", POSITIONS)


def position(name, grid=GRID):
    module = POSITIONS[name](WIDTH, HEADS, grid).double()
    with torch.no_grad():
        for i, parameter in enumerate(module.parameters()):
            parameter.copy_(numbers(*parameter.shape, seed=50 + i) / 2)
    return module


def scores(name, q, k, grid=GRID, module=None):
    """Return what the position makes of the plain scores q k / sqrt(D)."""
    module = position(name) if module is None else module
    similarity = module.widen(SIMILARITIES["scaled_dot"](WIDTH))
    q, k, bias = module(q, k, grid_coordinates(grid))
    return similarity(q, k) + (0 if bias is None else bias)


def rope(module, q, k, dy, dx):
    """Pairs of channels as complex numbers: turned by the offset alone."""
    total = 0.0
    for channel in range(0, WIDTH, 2):
        offset = dy if channel < WIDTH // 2 else dx
        theta = 100.0 ** -((channel // 2) % (WIDTH // 4) / (WIDTH / 4))
        a, b = (
            complex(*q[channel : channel + 2].tolist()),
            complex(*k[channel : channel + 2].tolist()),
        )
        total += (
            a * b.conjugate() * complex(math.cos(theta * offset), math.sin(theta * offset))
        ).real
    return total / WIDTH**0.5


def log_cpb(module, q, k, dy, dx):
    coordinates = [
        math.copysign(math.log2(1 + 8 * abs(d) / (n - 1)) / 3, d)
        for d, n in ((dy, GRID[0]), (dx, GRID[1]))
    ]
    hidden = (
        module.mlp[0].weight @ torch.tensor(coordinates, dtype=torch.float64) + module.mlp[0].bias
    ).clamp(min=0)
    return 16 / (1 + (-(module.mlp[2].weight @ hidden)).exp())


TWINS = {
    "rope": rope,
    "alibi": lambda module, q, k, dy, dx: torch.tensor(
        [-math.hypot(dy, dx) * 2.0 ** (-8 * h / HEADS) for h in range(1, HEADS + 1)],
        dtype=torch.float64,
    ),
    "relative": lambda module, q, k, dy, dx: module.table[:, dy + GRID[0] - 1, dx + GRID[1] - 1],
    "log_cpb": log_cpb,
    "decomposed": lambda module, q, k, dy, dx: (
        q @ module.rows[dy + GRID[0] - 1] + q @ module.columns[dx + GRID[1] - 1]
    ),
}


@every_position
def test_scores_equal_the_equation(name):
    module = position(name)
    q, k = (
        numbers(1, HEADS, PREFIX + TOKENS, WIDTH),
        numbers(1, HEADS, PREFIX + TOKENS, WIDTH, seed=1),
    )
    e = scores(name, q, k, module=module)[0]
    for i, j in [(0, 0), (0, 34), (34, 0), (3, 17), (30, 4), (8, 9)]:
        dy, dx = i // GRID[1] - j // GRID[1], i % GRID[1] - j % GRID[1]
        for h in range(HEADS):
            a, b = q[0, h, PREFIX + i], k[0, h, PREFIX + j]
            expected = torch.as_tensor(TWINS[name](module, a, b, dy, dx), dtype=torch.float64)
            if expected.ndim:  # one value per head
                expected = expected[h]
            if module.adds_to_scores:
                expected = a @ b / WIDTH**0.5 + expected
            torch.testing.assert_close(
                e[h, PREFIX + i, PREFIX + j], expected, rtol=1e-9, atol=1e-9, check_dtype=False
            )


@every_position
def test_tokens_without_a_place_keep_their_scores(name):
    q, k = (
        numbers(2, HEADS, PREFIX + TOKENS, WIDTH),
        numbers(2, HEADS, PREFIX + TOKENS, WIDTH, seed=1),
    )
    module = position(name)
    e = scores(name, q, k, module=module)
    plain = q @ k.transpose(-2, -1) / WIDTH**0.5
    torch.testing.assert_close(e[:, :, :PREFIX, :PREFIX], plain[:, :, :PREFIX, :PREFIX], **EXACT)
    if module.adds_to_scores:
        torch.testing.assert_close(e[:, :, :PREFIX], plain[:, :, :PREFIX], **EXACT)
        torch.testing.assert_close(e[..., :PREFIX], plain[..., :PREFIX], **EXACT)


@every_position
def test_only_the_offset_counts(name):
    """The same query and key at other places of the same offset get the same score."""
    q, k = (
        numbers(1, HEADS, 1, WIDTH).expand(-1, -1, TOKENS, -1),
        numbers(1, HEADS, 1, WIDTH, seed=1),
    )
    e = scores(name, q, k.expand(-1, -1, TOKENS, -1))[0].unflatten(1, GRID).unflatten(3, GRID)
    torch.testing.assert_close(e[:, 1:, 2:, 1:, 2:], e[:, :-1, :-2, :-1, :-2], **EXACT)
    assert not torch.allclose(e[:, 0, 0, 0, 0], e[:, 0, 0, 4, 6])


@every_position
@pytest.mark.parametrize("relation", ["window", "shifted_window", "criss_cross", "neighborhood"])
def test_layouts_place_tokens_as_the_whole_grid_does(name, relation):
    """A layout with a position is self-attention under a mask with the same position."""
    local = build(relation, position=position(name))
    whole = build("self", position=position(name))
    whole.load_state_dict(local.state_dict())
    place = [(y, x) for y in range(GRID[0]) for x in range(GRID[1])]
    meets = RELATION_CASES[relation].meets
    mask = torch.tensor([[meets(a, b) for b in place] for a in place])[None, None]
    x = numbers(2, TOKENS, DIM)
    torch.testing.assert_close(local(x, grid=GRID), whole(x, grid=GRID, mask=mask), **EXACT)


@every_position
def test_strips_place_tokens_as_the_whole_grid_does(name):
    axial, x = (
        RELATIONS["axial"](DIM, HEADS, position=position(name)).double(),
        numbers(2, TOKENS, DIM),
    )
    y = x
    for part, same in ((axial.height, 1), (axial.width, 0)):
        whole = build("self", position=position(name))
        whole.load_state_dict(part.state_dict())
        place = torch.cartesian_prod(torch.arange(GRID[0]), torch.arange(GRID[1]))[:, same]
        y = whole(y, grid=GRID, mask=(place[:, None] == place)[None, None])
    torch.testing.assert_close(axial(x, grid=GRID), y, **EXACT)


@every_position
def test_coarse_grids_place_tokens_in_steps(name):
    """Groups of the coarse grid look alike: a pattern that repeats within the steps comes out repeating."""
    module = build("grid", window_size=2, position=position(name, (2, 2)))
    coarse = numbers(1, 2, 2, DIM)
    x = coarse.repeat_interleave(3, 1).repeat_interleave(2, 2).flatten(1, 2)
    y = module(x, grid=(6, 4)).unflatten(1, (2, 3, 2, 2))
    torch.testing.assert_close(y, y[:, :, :1, :, :1].expand_as(y), **EXACT)
    assert not torch.allclose(y[:, 0, 0, 0, 0], y[:, 1, 0, 1, 0])


@every_position
@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_with_every_similarity(name, similarity):
    def run(impl):
        f_sim = make_similarity(similarity, WIDTH, HEADS)
        module = build("self", f_sim, NORMALIZERS["sparsemax"](HEADS), position=position(name))
        module.attend.impl = impl
        x = numbers(2, TOKENS, DIM).requires_grad_()
        y = module(x, grid=GRID)
        return y, torch.autograd.grad(
            (y * numbers(*y.shape, seed=9)).sum(), [x, *module.position.parameters()]
        )

    if (name, similarity) == ("decomposed", "efficient"):
        with pytest.raises(ValueError, match="decomposed positions cannot join Efficient"):
            run("auto")
        return
    (y, got), (expected, wanted) = run("auto"), run("dense")
    torch.testing.assert_close(y, expected, **EXACT)
    torch.testing.assert_close(got, wanted, rtol=1e-8, atol=1e-9)


@every_position
@pytest.mark.parametrize("normalizer", NORMALIZERS)
def test_with_every_normalizer(name, normalizer):
    module = build("self", None, NORMALIZERS[normalizer](HEADS), position=position(name))
    x = numbers(2, TOKENS, DIM)
    y = module(x, grid=GRID)
    module.attend.impl = "dense"
    torch.testing.assert_close(y, module(x, grid=GRID), **EXACT)


@every_position
def test_every_parameter_learns(name):
    module, x = (
        build("window", window_size=3, position=position(name, (3, 3))),
        numbers(2, TOKENS, DIM),
    )
    (module(x, grid=GRID) * numbers(2, TOKENS, DIM, seed=9)).sum().backward()
    for key, parameter in module.position.named_parameters():
        assert parameter.grad.isfinite().all() and parameter.grad.any(), key


@every_position
def test_gradcheck(name):
    module, x = (
        build("window", window_size=3, position=position(name)),
        numbers(1, TOKENS, DIM).requires_grad_(),
    )
    assert torch.autograd.gradcheck(lambda x: module(x, grid=GRID), x, fast_mode=True)


@every_position
@pytest.mark.parametrize("grid", [(1, 1), (1, 13), (3, 2), (11, 17)])
def test_any_grid(name, grid):
    """Smaller grids read the middle of a table, larger ones stretch it."""
    module, x = build("self", position=position(name)), numbers(2, grid[0] * grid[1], DIM)
    assert module(x, grid=grid).isfinite().all()


@every_position
def test_smaller_grids_keep_the_meaning_of_an_offset(name):
    q, k = numbers(1, HEADS, TOKENS, WIDTH), numbers(1, HEADS, TOKENS, WIDTH, seed=1)
    corner = torch.arange(TOKENS).view(GRID)[:3, :4].flatten()
    e = scores(name, q, k)[:, :, corner][..., corner]
    torch.testing.assert_close(scores(name, q[:, :, corner], k[:, :, corner], (3, 4)), e, **EXACT)


@every_position
def test_half_precision_and_meta(name):
    module = build("self", position=position(name)).float()
    x = numbers(2, PREFIX + TOKENS, DIM, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        half = module(x, grid=GRID)
    torch.testing.assert_close(half.float(), module(x, grid=GRID), rtol=0.1, atol=0.1)
    assert module.bfloat16()(x.bfloat16(), grid=GRID).dtype == torch.bfloat16
    assert module.to("meta")(x.bfloat16().to("meta"), grid=GRID).is_meta


@pytest.mark.parametrize("name", ["decomposed"])
def test_compiles_whole(name):
    torch.compiler.reset()
    module, x = build("self", position=position(name)), numbers(2, PREFIX + TOKENS, DIM)
    compiled = torch.compile(lambda x: module(x, grid=GRID), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), module(x, grid=GRID), **EXACT)


@pytest.mark.parametrize("name", ["rope", "relative"])
def test_exports_with_any_batch(name):
    class Whole(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.relation = build("window", position=position(name))

        def forward(self, x):
            return call("window", self.relation, x)

    whole, dynamic = Whole(), ({0: torch.export.Dim.DYNAMIC},)
    program = torch.export.export(
        whole, (numbers(2, TOKENS, DIM),), dynamic_shapes=dynamic, strict=False
    )
    x = numbers(3, TOKENS, DIM, seed=1)
    torch.testing.assert_close(program.module()(x), whole(x), **EXACT)


def test_decomposed_forms_no_square_matrix():
    q, k, bias = position("decomposed")(
        *(numbers(1, HEADS, TOKENS, WIDTH, seed=i) for i in (0, 1)), grid_coordinates(GRID)
    )
    assert bias is None and q.shape == k.shape == (1, HEADS, TOKENS, WIDTH + GRID[0] + GRID[1])


def test_decomposed_agrees_with_sam_in_timm():
    module, q = position("decomposed"), numbers(2, HEADS, TOKENS, WIDTH)
    bias = get_decomposed_rel_pos_bias(q.flatten(0, 1), module.rows, module.columns, GRID, GRID)
    expected = q.flatten(0, 1) @ q.flatten(0, 1).transpose(1, 2) / WIDTH**0.5 + bias.flatten(
        1, 2
    ).view(-1, 35, 35)
    torch.testing.assert_close(
        scores("decomposed", q, q, module=module).flatten(0, 1), expected, **EXACT
    )


def test_rope_agrees_with_timm():
    q = numbers(2, HEADS, TOKENS, 16)
    sin, cos = build_rotary_pos_embed(
        list(GRID), dim=16, temperature=100.0, in_pixels=False, dtype=torch.float64
    )
    turned, _, _ = POSITIONS["rope"](16)(q, q, grid_coordinates(GRID))
    torch.testing.assert_close(turned, apply_rot_embed(q, sin, cos), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(turned.norm(dim=-1), q.norm(dim=-1), **EXACT)


def test_map_shows_the_position():
    module, seen = build("self", position=position("relative")), []
    module.attend.register_forward_hook(lambda m, i, k, o: seen.append((i, k, o)), with_kwargs=True)
    module(numbers(2, TOKENS, DIM), grid=GRID)
    (q, k, v), given, m = seen[0]
    torch.testing.assert_close(attention_map(q, k, bias=given["bias"]) @ v, m, **EXACT)


@pytest.mark.parametrize(
    "make, message",
    [
        (
            lambda: POSITIONS["rope"](6),
            "head_dim must be a multiple of 4 for a rotation by rows and columns; got 6",
        ),
        (lambda: POSITIONS["alibi"](4, 0), "num_heads must be at least 1; got 0"),
        (lambda: POSITIONS["relative"](4, 3), r"grid must be \(rows, columns\) .*; got None"),
        (
            lambda: POSITIONS["log_cpb"](4, 3, (0, 7)),
            r"grid must be \(rows, columns\) .*; got \(0, 7\)",
        ),
        (
            lambda: POSITIONS["decomposed"](4, 3, (5,)),
            r"grid must be \(rows, columns\) .*; got \(5,\)",
        ),
        (
            lambda: build("self", position=position("rope"))(numbers(1, TOKENS, DIM)),
            "grid must be given",
        ),
    ],
)
def test_refusals(make, message):
    with pytest.raises(ValueError, match=message):
        make()
