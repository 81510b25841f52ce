"""The contract of the relations, their layouts, and their agreement with other people's code."""

import copy
import io
import pickle
from pathlib import Path

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
from timm.layers import AttentionPoolLatent
from timm.models import swin_transformer as swin
from timm.models import swin_transformer_v2 as swin2
from timm.models.cait import ClassAttn
from timm.models.xcit import XCA

from visattn.core.attention import RELATIONS
from visattn.core.formula import Attend, attention_map
from visattn.core.layout import Channels, CrissCross, Grid, Neighborhood, Windows, strips
from visattn.core.normalize import NORMALIZERS
from visattn.core.position.bias import LogCpb, RelativeTable
from visattn.core.similarity import SIMILARITIES

EXACT = {"rtol": 1e-10, "atol": 1e-10}
PARITY = Path(__file__).parent / "parity"
PAIRS = [(similarity, normalizer) for similarity in SIMILARITIES for normalizer in NORMALIZERS]
every_relation = pytest.mark.parametrize("name", RELATIONS)


def grads(module, x, out):
    inputs = [x, *module.parameters()]
    return torch.autograd.grad((out * numbers(*out.shape, seed=99)).sum(), inputs, allow_unused=True)


def test_every_relation_has_its_case():
    assert set(RELATIONS) == set(RELATION_CASES)


@pytest.mark.parametrize("name", [name for name, case in RELATION_CASES.items() if case.meets])
def test_relation_equals_its_twin(name):
    module, x = build(name), numbers(2, TOKENS, DIM)
    y = call(name, module, x).detach().numpy()
    for b in (0, 1):
        np.testing.assert_allclose(y[b], relation_slowly(module, x[b].numpy(), RELATION_CASES[name].meets), atol=1e-10)


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
    m = np.concatenate([attend_slowly(q[:, h], k[:, h], v[:, h], lambda i, j: True) for h in heads], 1)
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


@pytest.mark.parametrize("name", [name for name, case in RELATION_CASES.items() if case.grid])
@pytest.mark.parametrize("normalizer", ["softmax", "double", "sigmoid"])
@pytest.mark.parametrize("grid", [(1, 1), (1, 13), (6, 6), (11, 3)])
def test_any_grid(name, normalizer, grid):
    module = build(name, None, make_normalizer(normalizer, HEADS))
    y = module(numbers(2, grid[0] * grid[1], DIM), grid=grid)
    assert y.shape == (2, grid[0] * grid[1], DIM) and y.isfinite().all()


@pytest.mark.parametrize("name", [name for name, case in RELATION_CASES.items() if case.takes_context])
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
    for (key, _), gradient in zip([("x", x), *module.named_parameters()], grads(module, x, out), strict=True):
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
    assert call(name, module, torch.empty(2, TOKENS, DIM, dtype=torch.float64, device="meta")).is_meta


@every_relation
def test_map_times_values_is_the_output(name):
    """What an Attend got is enough for its map; with the map the output is given, and without it the output changes."""
    module, x, seen = build(name), numbers(2, TOKENS, DIM), []
    attends = [m for m in module.modules() if isinstance(m, Attend)]
    hooks = [m.register_forward_hook(lambda m, i, k, o: seen.append((m, i, k, o)), with_kwargs=True) for m in attends]
    y = call(name, module, x)
    assert len(seen) == RELATION_CASES[name].maps
    for attend, (q, k, v), given, m in seen:
        alpha = attention_map(q, k, attend.similarity, attend.normalize, bias=given.get("bias"), mask=given.get("mask"))
        torch.testing.assert_close(alpha @ v, m, **EXACT)
        layout = given.get("layout")
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
            build(name)(numbers(2, TOKENS, DIM), grid=GRID, mask=torch.ones(TOKENS, TOKENS, dtype=torch.bool))


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
        whole, (numbers(2, TOKENS, DIM),), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},), strict=False
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
    places = layout.places()
    assert places.queries.amax((0, 1)).tolist() < list(places.extent) or places.extent == (1, 1)


def test_channels_fold_back():
    x = numbers(2, 3, 7, 5)
    assert torch.equal(Channels().unfold(Channels().fold(x)), x)


def test_neighborhood_keeps_its_size_everywhere():
    layout = Neighborhood((11, 13), (5, 3))
    real = layout.token_index() >= 0
    assert layout.meets()[:, 0].sum(-1)[real].unique().tolist() == [15]


@pytest.mark.parametrize("shift", [0, 2])
def test_swin_windows_agree_with_timm(shift):
    theirs = swin.SwinTransformerBlock(DIM, (8, 12), HEADS, window_size=4, shift_size=shift).double().eval()
    ours = RELATIONS["shifted_window" if shift else "window"](
        DIM, HEADS, window_size=4, position=RelativeTable(DIM // HEADS, HEADS, (4, 4))
    ).double()
    with torch.no_grad():
        for parameter in theirs.attn.parameters():
            parameter.normal_()
        table = theirs.attn.relative_position_bias_table
        ours.position.table.copy_(table.T.reshape(HEADS, 7, 7))
    state = {key: value for key, value in theirs.attn.state_dict().items() if "relative" not in key}
    ours.load_state_dict({**state, "position.table": ours.position.table})
    x = numbers(2, 8, 12, DIM)
    expected = theirs._attn(x).flatten(1, 2)
    torch.testing.assert_close(ours(x.flatten(1, 2), grid=(8, 12)), expected, **EXACT)


def test_swin_v2_windows_agree_with_timm():
    torch.manual_seed(0)
    theirs = swin2.WindowAttention(DIM, (4, 4), HEADS).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_()
        theirs.logit_scale.copy_(torch.tensor([0.5, 3.0, 7.0])[:, None, None])  # the last one lies above the bound
        theirs._init_buffers()
    theirs = theirs.double()
    f_sim = SIMILARITIES["cosine"](DIM // HEADS, HEADS)
    position = LogCpb(DIM // HEADS, HEADS, (4, 4))
    ours = RELATIONS["window"](DIM, HEADS, similarity=f_sim, window_size=4, position=position).double()
    state = {f"position.mlp.{key[8:]}": value for key, value in theirs.state_dict().items() if "cpb_mlp" in key}
    state |= {"qkv.weight": theirs.qkv.weight, "attend.similarity.logit_scale": theirs.logit_scale}
    state |= {"qkv.bias": torch.cat([theirs.q_bias, torch.zeros(DIM), theirs.v_bias])}
    ours.load_state_dict(state | {"proj.weight": theirs.proj.weight, "proj.bias": theirs.proj.bias})
    x = numbers(2, 16, DIM)
    torch.testing.assert_close(ours(x, grid=(4, 4)), theirs(x), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "name, theirs, options",
    [
        ("class", lambda: ClassAttn(DIM, HEADS, qkv_bias=True), {}),
        ("pool", lambda: AttentionPoolLatent(DIM, num_heads=HEADS, latent_len=2, pool_type="", norm_layer=_norm), {}),
    ],
)
def test_one_sided_attention_agrees_with_timm(name, theirs, options):
    theirs, ours = theirs().double().eval(), build(name, **options)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    x = numbers(2, TOKENS, DIM)
    torch.testing.assert_close(ours(x), theirs(x), **EXACT)


def _norm(dim, **placement):
    return torch.nn.LayerNorm(dim, eps=1e-6, **placement)


def load(name):
    with np.load(PARITY / f"{name}.npz") as file:
        numbers = {key: torch.from_numpy(file[key]) for key in file.files if key != "meta"}
    weights = {key[6:]: value for key, value in numbers.items() if key.startswith("param/")}
    return numbers["in/0/0"], numbers["out/0/0"], weights


def close(got, expected):
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())


def positive(weights, heads):
    """Take the sign of a head's temperature into its queries, since ours is positive."""
    sign = weights["temperature"].sign().flatten()
    width = len(weights["proj.bias"]) // heads
    flip = torch.cat([sign.repeat_interleave(width), torch.ones(2 * heads * width)])
    return {
        "qkv.weight": weights["qkv.weight"] * flip[:, None],
        "qkv.bias": weights["qkv.bias"] * flip,
        "proj.weight": weights["proj.weight"],
        "proj.bias": weights["proj.bias"],
        "attend.similarity.logit_scale": weights["temperature"].abs().log(),
    }


def test_channel_attention_agrees_with_xca():
    x, expected, weights = load("xca_timm")
    ours = RELATIONS["channel"](32, 4)
    ours.load_state_dict(positive(weights, 4))
    close(ours(x), expected)
    theirs = XCA(32, 4, qkv_bias=True)
    theirs.load_state_dict(weights)
    y = numbers(2, 7, 32, dtype=torch.float32)
    close(ours(y), theirs(y))


@pytest.mark.parametrize("name, relation", [("danet_pam", "self"), ("criss_cross", "criss_cross")])
def test_segmentation_attention_agrees_with_the_authors(name, relation):
    """Queries and keys of fewer channels than the values are the same with zeros behind them."""
    x, expected, w = load(name)
    ours = RELATIONS[relation](32, 1, similarity=SIMILARITIES["dot"](32))
    qkv = [torch.nn.functional.pad(w[f"{p}_conv.weight"].flatten(1), (0, 0, 0, 28)) for p in ("query", "key")]
    bias = [torch.nn.functional.pad(w[f"{p}_conv.bias"], (0, 28)) for p in ("query", "key")]
    with torch.no_grad():
        ours.qkv.weight.copy_(torch.cat([*qkv, w["value_conv.weight"].flatten(1)]))
        ours.qkv.bias.copy_(torch.cat([*bias, w["value_conv.bias"]]))
        ours.proj.weight.copy_(torch.eye(32))
        ours.proj.bias.zero_()
    m = ours(x.flatten(2).transpose(1, 2), grid=(14, 14)).transpose(1, 2).unflatten(2, (14, 14))
    close(w["gamma"] * m + x, expected)


def test_memory_agrees_with_external_attention():
    x, expected, w = load("external")
    ours = RELATIONS["memory"](32, 1, num_slots=64)
    ours.load_state_dict(
        {
            "q.weight": w["conv1.weight"].flatten(1),
            "q.bias": w["conv1.bias"],
            "keys": w["linear_0.weight"][None, :, :, 0],
            "values": w["linear_1.weight"][None, :, :, 0].transpose(1, 2),
            "proj.weight": w["conv2.0.weight"].flatten(1),
            "proj.bias": torch.zeros(32),
        }
    )
    y = ours(x.flatten(2).transpose(1, 2)).transpose(1, 2).unflatten(2, (14, 14))
    statistics = (w[f"conv2.1.{key}"] for key in ("running_mean", "running_var", "weight", "bias"))
    close((torch.nn.functional.batch_norm(y, *statistics) + x).relu(), expected)
