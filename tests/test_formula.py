"""Properties of the formula beyond single pairs: limits, shapes, extreme numbers, refusals."""

import pytest
import torch
import torch.nn.functional as F
from core_cases import (
    DV,
    EXACT,
    NK,
    NQ,
    B,
    D,
    H,
    assert_same_gradients,
    differentiate,
    make_normalizer,
    make_pair,
    make_similarity,
    qkv,
    tokens,
)

from visattn.core.formula import Attend, attend, attention_map, plan
from visattn.core.kernels import blocked, recompute
from visattn.core.kernels.threshold import threshold
from visattn.core.normalize import NORMALIZERS
from visattn.core.similarity import SIMILARITIES
from visattn.core.similarity.definition import Similarity


def test_default_is_scaled_dot_product_attention():
    q, k, v = qkv()
    torch.testing.assert_close(attend(q, k, v), F.scaled_dot_product_attention(q, k, v), **EXACT)


def test_entmax_runs_from_softmax_to_sparsemax():
    e = tokens(B, H, NQ, NK, scale=2.0)
    near_one = NORMALIZERS["entmax"](H, alpha=1 + 1e-5, learn=False).double()(e)
    torch.testing.assert_close(near_one, e.softmax(-1), rtol=1e-3, atol=1e-3)
    for alpha, name in ((1.5, "entmax15"), (2.0, "sparsemax")):
        fixed = NORMALIZERS["entmax"](H, alpha=alpha, learn=False).double()
        torch.testing.assert_close(fixed(e), NORMALIZERS[name]()(e), **EXACT)


def test_softmax1_is_softmax_with_one_empty_key():
    q, k, v = qkv()
    output = attend(q, k, v, None, NORMALIZERS["softmax1"]())
    expected = attend(q, F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1)))
    torch.testing.assert_close(output, expected, **EXACT)


def test_sinkhorn_columns_even_out():
    alpha = NORMALIZERS["sinkhorn"](iterations=200)(tokens(B, H, NQ, NK))
    torch.testing.assert_close(alpha.sum(-2), torch.full((B, H, NK), NQ / NK, dtype=alpha.dtype))


def test_negative_l2_keeps_its_digits_far_from_the_origin():
    q, k, v = qkv()
    f_sim = SIMILARITIES["negative_l2"](D, H)
    near = attend(q.float(), k.float(), v.float(), f_sim)
    far = attend(q.float() + 20, k.float() + 20, v.float(), f_sim)
    torch.testing.assert_close(far, near, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("p", [1.0, 4 / 3, 2.0, 4.0, 10.0])
@pytest.mark.parametrize("scale", [0.1, 1.0, 50.0])
@pytest.mark.parametrize("keys", [1, 2, 197, 2305])
def test_threshold_gives_unit_mass(p, scale, keys):
    x = tokens(7, keys, scale=scale)
    mass = ((x - threshold(x, p)).clamp(min=0) ** p).sum(-1)
    torch.testing.assert_close(mass, torch.ones(7, dtype=x.dtype), rtol=1e-9, atol=1e-9)


class Mixing(Similarity):
    """A similarity of one's own whose heads see each other."""

    def forward(self, q, k):
        return (q @ k.transpose(2, 3)).cumsum(1)


@pytest.mark.parametrize("budget", [8, 8 * 50, 8 * 200, 8 * 500])
@pytest.mark.parametrize("normalizer", ["entmax15", "l1", "topk", "entmax"])
@pytest.mark.parametrize("similarity", ["cosine", "additive", "laplacian", "bilinear", "mixing"])
def test_any_tile_size_gives_the_same(budget, normalizer, similarity, monkeypatch):
    f_sim = Mixing(D, H) if similarity == "mixing" else make_similarity(similarity, D, H)
    f_norm = make_normalizer(normalizer, H)
    bias = tokens(1, H, 1, NK, seed=6)

    def run(impl):
        def function(q, k, v, bias):
            return attend(q, k, v, f_sim, f_norm, bias=bias, impl=impl)

        return differentiate(function, (*qkv(), bias), (f_sim, f_norm))

    expected = run("dense")
    monkeypatch.setattr(blocked, "_TILE_BYTES", budget)
    monkeypatch.setattr(recompute, "_TILE_BYTES", budget)
    assert_same_gradients(run("blocked"), expected)


@pytest.mark.parametrize("name", NORMALIZERS)
def test_query_heads_may_share_a_key_head(name):
    q, k, v = tokens(B, 6, NQ, D), tokens(B, 2, NK, D, seed=1), tokens(B, 2, NK, DV, seed=2)
    f_norm = make_normalizer(name, 6)
    expected = attend(q, k.repeat_interleave(3, 1), v.repeat_interleave(3, 1), None, f_norm)
    torch.testing.assert_close(attend(q, k, v, None, f_norm), expected, **EXACT)


@pytest.mark.parametrize("name", NORMALIZERS)
def test_one_key(name):
    q, k, v = qkv(queries=1, keys=1)
    f_norm = make_normalizer(name, H)
    output = attend(q, k, v, None, f_norm)
    assert output.shape == (B, H, 1, DV) and output.isfinite().all()
    if f_norm.rows_sum_to_one:
        torch.testing.assert_close(output, v)


@pytest.mark.parametrize("name", NORMALIZERS)
def test_huge_scores_stay_finite(name):
    q, k, v = (x.float() for x in qkv())
    f_norm = make_normalizer(name, H).float()

    def function(q, k, v):
        return attend(q, k, v, None, f_norm)

    output, gradients = differentiate(function, (1e4 * q, 1e4 * k, v), ())
    assert output.isfinite().all()
    assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("name", ["softmax", "sigmoid", "entmax15", "sparsemax"])
def test_scores_beyond_half_precision(name):
    q, k, v = (x.half() for x in qkv())
    f_norm = make_normalizer(name, H)
    output = attend(300 * q, 300 * k, v, None, f_norm)
    expected = attend(300 * q.double(), 300 * k.double(), v.double(), None, f_norm)
    torch.testing.assert_close(output.double(), expected, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("name", NORMALIZERS)
def test_minus_infinity_in_the_bias_masks(name):
    q, k, v = qkv()
    f_norm = make_normalizer(name, H)
    mask = tokens(1, 1, NQ, NK, seed=4) > 0
    bias = torch.zeros(1, 1, NQ, NK, dtype=q.dtype).masked_fill(~mask, -torch.inf)
    output = attend(q, k, v, None, f_norm, bias=bias)
    torch.testing.assert_close(output, attend(q, k, v, None, f_norm, mask=mask))


@pytest.mark.parametrize("name", ["softmax", "sigmoid", "double", "topk"])
def test_strides_do_not_matter(name):
    f_norm = make_normalizer(name, H)
    q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in qkv())
    assert not q.is_contiguous()
    torch.testing.assert_close(attend(q, k, v, None, f_norm), attend(*qkv(), None, f_norm), **EXACT)


@pytest.mark.parametrize("shape", [(NQ, NK), (H, NQ, NK), (1, H, 1, NK), (B, 1, NQ, 1)])
def test_learned_bias_keeps_the_fused_kernel_and_its_gradient(shape):
    bias = tokens(*shape, seed=6)

    def run(impl):
        def function(q, k, v, bias):
            return attend(q, k, v, bias=bias, impl=impl)

        return differentiate(function, (*qkv(), bias), ())

    assert plan(*qkv(), bias=bias).impl == "sdpa"
    assert_same_gradients(run("sdpa"), run("dense"))


@pytest.mark.parametrize("name", ["softmax", "sigmoid", "topk", "double"])
def test_dropout_drops_weights_and_keeps_the_mean(name):
    q, k, v = qkv()
    f_norm = make_normalizer(name, H)
    torch.manual_seed(0)
    runs = torch.stack([attend(q, k, v, None, f_norm, dropout=0.5) for _ in range(400)])
    expected = attend(q, k, v, None, f_norm)
    assert not torch.equal(runs[0], runs[1])
    assert (runs.mean(0) - expected).abs().max() < 6 * runs.std(0).max() / 20


def test_dropout_is_for_training_only():
    inputs, module = qkv(), Attend(dropout=0.5)
    assert torch.equal(module.eval()(*inputs), attend(*inputs))
    assert not torch.equal(module.train()(*inputs), attend(*inputs))


@pytest.mark.parametrize(
    ("similarity", "normalizer", "impl"),
    [
        ("scaled_dot", "softmax", "sdpa"),
        ("cosine", "softmax1", "sdpa"),
        ("negative_l2", "double", "sdpa"),
        ("dot", "sinkhorn", "sdpa"),
        ("linear", "l1", "associative"),
        ("efficient", "none", "associative"),
        ("dot", "none", "associative"),
        ("dot", "l1", "blocked"),
        ("cosine", "entmax", "blocked"),
        ("additive", "softmax", "blocked"),
        ("laplacian", "topk", "blocked"),
        ("additive", "sinkhorn", "dense"),
    ],
)
def test_plan_names_the_evaluation(similarity, normalizer, impl):
    chosen = plan(*qkv(), make_similarity(similarity, D, H), make_normalizer(normalizer, H))
    assert chosen.impl == impl
    assert str(chosen).startswith(f"{impl}: ") and len(chosen.why) > 20


def test_plan_reads_bias_and_dropout():
    bias = tokens(1, 1, NQ, NK)
    linear, l1 = make_pair("linear", "l1")
    assert plan(*qkv(), linear, l1, bias=bias).impl == "blocked"
    assert plan(*qkv(), dropout=0.1).impl == "blocked"
    assert plan(*qkv(), None, make_normalizer("double", H), dropout=0.1).impl == "dense"
    assert plan(*qkv(), None, make_normalizer("gumbel", H).train()).impl == "dense"


def test_wide_values_are_not_padded_for():
    q, k, _ = qkv()
    v = tokens(B, H, NK, 200, seed=2)
    assert plan(q, k, v).impl == "blocked"
    assert plan(q, k, v[..., :100]).impl == "sdpa"
    torch.testing.assert_close(attend(q, k, v), attend(q, k, v, impl="sdpa"), **EXACT)


def test_gumbel_takes_a_generator():
    e = tokens(B, H, NQ, NK)

    def draw():
        return NORMALIZERS["gumbel"](generator=torch.Generator().manual_seed(3)).train()(e)

    assert torch.equal(draw(), draw())
    alpha = torch.stack([NORMALIZERS["gumbel"](tau=0.01).train()(e[0, 0, 0]) for _ in range(4000)])
    assert (alpha.mean(0) - e[0, 0, 0].softmax(-1)).abs().max() < 0.05


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q, k, v: attend(q[0], k, v), r"q must be \(B, H, N, D\); got shape \(3, 7, 5\)"),
        (lambda q, k, v: attend(q, k[:1], v), "must agree in B"),
        (lambda q, k, v: attend(q, k, v[:, :, :3]), "k and v in heads and tokens"),
        (lambda q, k, v: attend(q, k[:, :, :0], v[:, :, :0]), "k must have at least one token"),
        (
            lambda q, k, v: attend(q, k[:, :2], v[:, :2]),
            "query heads must be a multiple of key heads; got 3 and 2",
        ),
        (lambda q, k, v: attend(q, k[..., :3], v), "k must be 5 wide for ScaledDot; got 3"),
        (lambda q, k, v: attend(q, k, v, bias=torch.zeros(2, 5, 7, 11)), "bias must broadcast"),
        (lambda q, k, v: attend(q, k, v, mask=torch.ones(7, 12).bool()), "mask must broadcast"),
        (lambda q, k, v: attend(q, k, v, mask=torch.ones(7, 11)), "mask must be bool"),
        (lambda q, k, v: attend(q, k.to("meta"), v), "k must be on the device of q, cpu; got meta"),
        (
            lambda q, k, v: attend(q, k, v, impl="flash"),
            "impl must be one of auto, associative, sdpa",
        ),
        (
            lambda q, k, v: attend(q, k, v, None, NORMALIZERS["sigmoid"](), impl="sdpa"),
            "cannot be rewritten as a softmax",
        ),
        (lambda q, k, v: attend(q, k, v, impl="triton"), "auto would take sdpa"),
        (
            lambda q, k, v: attend(
                q, k, v, SIMILARITIES["efficient"](D), mask=torch.ones(7, 11).bool()
            ),
            "same for every query",
        ),
        (lambda q, k, v: attention_map(q, k[:1]), "must agree in B"),
        (lambda q, k, v: Attend(dropout=1.0), r"dropout must lie in \[0, 1\)"),
        (lambda q, k, v: Attend(impl="fast"), "impl must be one of"),
        (
            lambda q, k, v: attend(q, k, v, SIMILARITIES["cosine"](D, 2 * H)),
            "similarity must be made for",
        ),
        (
            lambda q, k, v: attend(q, k, v, None, NORMALIZERS["entmax"](2 * H)),
            "normalize must be made for",
        ),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        change(*qkv())


def test_names_are_for_configurations():
    with pytest.raises(TypeError, match="similarity must be an object"):
        Attend("cosine")


def test_autocast_does_not_round_the_accumulation():
    q, k, v = (x.float() for x in qkv())
    f_norm = make_normalizer("sigmoid", H)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = attend(q, k, v, None, f_norm)
    torch.testing.assert_close(output, attend(q, k, v, None, f_norm))


@pytest.mark.parametrize("similarity", SIMILARITIES)
@pytest.mark.parametrize("normalizer", NORMALIZERS)
def test_backward_outside_of_autocast(similarity, normalizer):
    q, k, v = (x.float().requires_grad_() for x in qkv())
    f_sim, f_norm = make_pair(similarity, normalizer)
    f_sim.float()
    f_norm.float()

    def differentiate_within(backward_autocast):
        torch.manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16):
            m = attend(q, k, v, f_sim, f_norm)
        with torch.autocast("cpu", torch.bfloat16, enabled=backward_autocast):
            loss = m.float().square().sum()
            return torch.autograd.grad(loss, (q, k, v), allow_unused=True)

    outside = differentiate_within(False)
    torch.testing.assert_close(outside, differentiate_within(True), rtol=0.05, atol=0.05)


def test_dropout_with_a_learned_bias_drops():
    q, k, v = qkv()
    bias = torch.zeros(1, 1, NQ, NK, dtype=q.dtype, requires_grad=True)
    m = attend(q, k, v, bias=bias, dropout=0.9, impl="sdpa")
    assert (m - attend(q, k, v, bias=bias)).abs().max() > 0.01


def cooler(parent, **options):
    """A normalizer of one's own, derived from one that has faster evaluations."""

    class Cooler(parent):
        def weights(self, e, count):
            return super().weights(e / 5, count)

    return Cooler(**options)


@pytest.mark.parametrize("name", NORMALIZERS)
def test_a_derived_normalizer_is_evaluated_as_it_says(name):
    q, k, v = qkv()
    f_norm = cooler(NORMALIZERS[name], num_heads=H).double().eval()
    expected = attention_map(q, k, None, f_norm) @ v
    torch.testing.assert_close(attend(q, k, v, None, f_norm), expected, **EXACT)


@pytest.mark.parametrize("name", SIMILARITIES)
def test_a_derived_similarity_is_evaluated_as_it_says(name):
    class Warmer(SIMILARITIES[name]):
        def forward(self, q, k):
            return 5 * super().forward(q, k)

    q, k, v = qkv()
    f_sim = Warmer(D, H).double()
    torch.testing.assert_close(attend(q, k, v, f_sim), attention_map(q, k, f_sim) @ v, **EXACT)


@pytest.mark.parametrize("name", NORMALIZERS)
@pytest.mark.parametrize("batch, queries", [(0, NQ), (B, 0)])
def test_no_images_or_no_queries(name, batch, queries):
    q, k, v = (x[:batch].requires_grad_() for x in qkv())
    m = attend(q[:, :, :queries], k, v, None, make_normalizer(name, H))
    m.sum().backward()
    assert m.shape == (batch, H, queries, DV) and not q.grad.any()
