"""The contract of the formula: every similarity, every normalizer, every pair, every evaluation."""

import copy
import pickle

import numpy as np
import pytest
import torch
from core_cases import (
    DV,
    EXACT,
    NK,
    NORMALIZER_CASES,
    NQ,
    SIMILARITY_CASES,
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

from visattn.core.formula import IMPLS, Attend, attend, attention_map, plan
from visattn.core.normalize import NORMALIZERS
from visattn.core.similarity import SIMILARITIES

PAIRS = [(similarity, normalizer) for similarity in SIMILARITIES for normalizer in NORMALIZERS]
# equal scores (concat's many zeros) leave the choice of the k largest open
WITHOUT_TIES = [pair for pair in PAIRS if pair != ("concat", "topk")]


def serves(impl, *args, **kwargs):
    try:
        attend(*args, impl=impl, **kwargs)
    except ValueError as error:
        assert "cannot serve" in str(error)
        return False
    return True


def test_every_entry_has_its_case():
    assert set(SIMILARITIES) == set(SIMILARITY_CASES)
    assert set(NORMALIZERS) == set(NORMALIZER_CASES)


@pytest.mark.parametrize("name", SIMILARITIES)
def test_similarity_equals_its_twin(name):
    module = make_similarity(name, D, H)
    q, k, _ = qkv()
    e = module(q, k).detach().numpy()
    for b, h, i, j in [(0, 0, 0, 0), (1, 2, 6, 10), (0, 1, 3, 7), (1, 0, 5, 2)]:
        parameters = {key: value[h].detach().numpy() for key, value in module.named_parameters()}
        query = q[b, h, i].numpy()
        keys = k[b, h].numpy()
        expected = SIMILARITY_CASES[name].twin(query, keys[j], parameters, keys)
        assert e[b, h, i, j] == pytest.approx(expected)


@pytest.mark.parametrize("name", NORMALIZERS)
def test_normalizer_equals_its_twin(name):
    e = tokens(B, H, NQ, NK, seed=3, scale=2.0)
    alpha = make_normalizer(name, H)(e).detach().numpy()
    for b, h in [(0, 0), (1, 2)]:
        expected = NORMALIZER_CASES[name].twin(e[b, h].numpy())
        np.testing.assert_allclose(alpha[b, h], expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", SIMILARITIES)
def test_dot_form_is_exact(name):
    module = make_similarity(name, D, H)
    q, k, _ = qkv()
    form = module.dot_form(q, k)
    if form is None:
        assert not serves("sdpa", *qkv(), module)
        return
    q2, k2, bias = form
    e = q2 @ k2.transpose(-2, -1) + (0 if bias is None else bias)
    torch.testing.assert_close(e, module(q, k), **EXACT)


@pytest.mark.parametrize(("similarity", "normalizer"), PAIRS)
@pytest.mark.parametrize("masked", [False, True])
def test_every_evaluation_equals_the_definition(similarity, normalizer, masked):
    f_sim, f_norm = make_pair(similarity, normalizer)
    inputs = qkv()
    mask = tokens(B, 1, 1, NK, seed=4) > -0.5 if masked else None

    def run(impl):
        def function(q, k, v):
            return attend(q, k, v, f_sim, f_norm, mask=mask, impl=impl)

        return differentiate(function, inputs, (f_sim, f_norm))

    expected = run("dense")
    serving = [impl for impl in IMPLS if serves(impl, *inputs, f_sim, f_norm, mask=mask)]
    assert plan(*inputs, f_sim, f_norm, mask=mask).impl in serving
    for impl in serving:
        assert_same_gradients(run(impl), expected)


@pytest.mark.parametrize(
    ("similarity", "normalizer"), [pair for pair in PAIRS if pair[0] != "efficient"]
)
def test_bias_and_dead_rows(similarity, normalizer):
    f_sim, f_norm = make_pair(similarity, normalizer)
    q, k, v = qkv()
    mask = tokens(B, 1, NQ, NK, seed=4) > 0.3
    mask[:, :, 2] = False
    bias = tokens(1, H, NQ, NK, seed=6)

    def run(impl):
        def function(q, k, v, bias):
            return attend(q, k, v, f_sim, f_norm, bias=bias, mask=mask, impl=impl)

        return differentiate(function, (q, k, v, bias), (f_sim, f_norm))

    output, gradients = run("auto")
    assert (output[:, :, 2] == 0).all()
    assert_same_gradients((output, gradients), run("dense"))


@pytest.mark.parametrize(("similarity", "normalizer"), PAIRS)
def test_map_times_values_is_the_output(similarity, normalizer):
    f_sim, f_norm = make_pair(similarity, normalizer)
    q, k, v = qkv()
    alpha = attention_map(q, k, f_sim, f_norm)
    torch.testing.assert_close(alpha @ v, attend(q, k, v, f_sim, f_norm), **EXACT)
    torch.testing.assert_close(
        attention_map(q, k, f_sim, f_norm, rows=[6, 0]), alpha[:, :, [6, 0]], **EXACT
    )
    if f_norm.rows_sum_to_one:
        torch.testing.assert_close(alpha.sum(-1), torch.ones(B, H, NQ, dtype=alpha.dtype), **EXACT)


@pytest.mark.parametrize(("similarity", "normalizer"), WITHOUT_TIES)
def test_masked_is_the_shorter_problem(similarity, normalizer):
    f_sim, f_norm = make_pair(similarity, normalizer)
    q, k, v = qkv()
    keep = torch.tensor([0, 2, 3, 5, 8])
    mask = torch.zeros(NK, dtype=torch.bool)
    mask[keep] = True
    shorter = attend(q, k[:, :, keep], v[:, :, keep], f_sim, f_norm)
    torch.testing.assert_close(attend(q, k, v, f_sim, f_norm, mask=mask), shorter, **EXACT)


@pytest.mark.parametrize(("similarity", "normalizer"), PAIRS)
def test_lower_precision(similarity, normalizer):
    f_sim, f_norm = make_pair(similarity, normalizer)
    inputs = qkv()
    expected = attend(*inputs, f_sim, f_norm)
    single = attend(*(x.float() for x in inputs), f_sim.float(), f_norm.float())
    torch.testing.assert_close(single, expected.float(), rtol=1e-5, atol=1e-5)
    half = attend(*(x.bfloat16() for x in inputs), f_sim.bfloat16(), f_norm)
    assert half.dtype == torch.bfloat16
    if normalizer not in ("hard", "topk"):  # a rounded score may change which key is chosen
        assert (half.double() - expected).abs().mean() < 0.05 * expected.abs().mean() + 0.05


@pytest.mark.parametrize(("similarity", "normalizer"), WITHOUT_TIES)
def test_keys_may_be_permuted(similarity, normalizer):
    f_sim, f_norm = make_pair(similarity, normalizer)
    q, k, v = qkv()
    order = torch.randperm(NK, generator=torch.Generator().manual_seed(1))
    output = attend(q, k[:, :, order], v[:, :, order], f_sim, f_norm)
    torch.testing.assert_close(output, attend(q, k, v, f_sim, f_norm), **EXACT)


@pytest.mark.parametrize("name", NORMALIZERS)
def test_declarations_hold(name):
    module = make_normalizer(name, H)
    e = tokens(B, H, NQ, NK, seed=3)
    alpha = module(e)
    shifted = module(e + tokens(B, H, NQ, 1, seed=8))
    rows = module(e[:, :, :3])
    assert torch.allclose(alpha, shifted, rtol=1e-9) == module.shift_invariant
    assert torch.allclose(alpha[:, :, :3], rows, rtol=1e-9) == module.row_local
    one = torch.ones(1, dtype=e.dtype)
    assert torch.allclose(alpha.sum(-1), one, rtol=1e-9) == module.rows_sum_to_one
    assert bool(module.stochastic) == (not torch.equal(module.train()(e), module(e)))


def first_image(count):
    """Return the first ``count`` tokens of the first image, to be differentiated."""
    return [x[:1, :, :count].clone().requires_grad_() for x in qkv()]


@pytest.mark.parametrize("name", SIMILARITIES)
@pytest.mark.parametrize("impl", ["auto", "blocked", "dense"])
def test_gradcheck_of_similarity(name, impl):
    f_sim = make_similarity(name, D, H)
    inputs = first_image(3)
    assert torch.autograd.gradcheck(lambda q, k, v: attend(q, k, v, f_sim, impl=impl), inputs)


@pytest.mark.parametrize("name", [name for name in NORMALIZERS if NORMALIZERS[name].differentiable])
@pytest.mark.parametrize("impl", ["auto", "dense"])
def test_gradcheck_of_normalizer(name, impl):
    f_norm = make_normalizer(name, H)
    inputs = first_image(5)
    parameters = tuple(f_norm.parameters())

    def function(q, k, v, *values):
        return attend(q, k, v, None, f_norm, impl=impl)

    assert torch.autograd.gradcheck(function, (*inputs, *parameters), atol=1e-4)


@pytest.mark.parametrize("name", ["softmax", "sigmoid", "entmax15", "sparsemax"])
def test_second_derivatives_of_the_definition(name):
    f_norm = make_normalizer(name, H)
    inputs = first_image(3)
    assert torch.autograd.gradgradcheck(lambda *x: attend(*x, None, f_norm, impl="dense"), inputs)


def test_second_derivative_through_tiles_says_so():
    q, k, v = (x.requires_grad_() for x in qkv())
    m = attend(q, k, v, None, make_normalizer("sigmoid", H))
    (gradient,) = torch.autograd.grad(m.sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="impl='dense'"):
        gradient.sum().backward()


@pytest.mark.parametrize("name", SIMILARITIES)
def test_every_parameter_of_a_similarity_learns(name):
    f_sim = make_similarity(name, D, H)
    _, gradients = differentiate(lambda q, k, v: attend(q, k, v, f_sim), qkv(), (f_sim,))
    assert all(gradient.abs().max() > 1e-9 for gradient in gradients[3:])


def pair_module(similarity, normalizer):
    f_sim, f_norm = make_pair(similarity, normalizer)
    return Attend(f_sim, f_norm).float().eval()


ONE_BY_ONE = [(name, "softmax") for name in SIMILARITIES] + [
    ("scaled_dot", name) for name in list(NORMALIZERS)[1:]
]


@pytest.mark.parametrize(("similarity", "normalizer"), ONE_BY_ONE)
def test_compiles_whole(similarity, normalizer):
    torch.compiler.reset()
    module = pair_module(similarity, normalizer)
    inputs = [x.float().requires_grad_() for x in qkv()]
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    output = compiled(*inputs)
    expected = module(*inputs)
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)
    gradients = torch.autograd.grad(output.sum(), inputs)
    expected_gradients = torch.autograd.grad(expected.sum(), inputs)
    torch.testing.assert_close(gradients, expected_gradients, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("similarity", "normalizer"), ONE_BY_ONE)
def test_exports_with_dynamic_tokens(similarity, normalizer):
    module = pair_module(similarity, normalizer)
    inputs = [x.float() for x in qkv()]
    queries = torch.export.Dim("queries", min=2, max=64)
    keys = torch.export.Dim("keys", min=4, max=64)
    program = torch.export.export(
        module, tuple(inputs), dynamic_shapes=({2: queries}, {2: keys}, {2: keys})
    )
    inputs = [x.float() for x in qkv(queries=5, keys=17)]
    torch.testing.assert_close(program.module()(*inputs), module(*inputs), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("similarity", "normalizer"), ONE_BY_ONE)
def test_copies_and_states(similarity, normalizer):
    module = pair_module(similarity, normalizer)
    inputs = [x.float() for x in qkv()]
    expected = module(*inputs)
    assert torch.equal(copy.deepcopy(module)(*inputs), expected)
    assert torch.equal(pickle.loads(pickle.dumps(module))(*inputs), expected)
    untrained = Attend(
        SIMILARITIES[similarity](D, H, **SIMILARITY_CASES[similarity].options),
        NORMALIZERS[normalizer](H, **NORMALIZER_CASES[normalizer].options),
    ).eval()
    untrained.load_state_dict(module.state_dict())
    assert torch.equal(untrained(*inputs), expected)


@pytest.mark.parametrize(("similarity", "normalizer"), ONE_BY_ONE)
def test_needs_no_device(similarity, normalizer):
    module = pair_module(similarity, normalizer).to("meta")
    inputs = [x.float().to("meta") for x in qkv()]
    assert module(*inputs).shape == (B, H, NQ, DV)


@pytest.mark.parametrize(("similarity", "normalizer"), ONE_BY_ONE)
def test_inputs_stay_and_images_are_independent(similarity, normalizer):
    module = pair_module(similarity, normalizer)
    inputs = [x.float() for x in qkv()]
    before = [x.clone() for x in inputs]
    output = module(*inputs)
    assert torch.equal(module(*inputs), output)
    assert all(torch.equal(x, y) for x, y in zip(inputs, before, strict=True))
    torch.testing.assert_close(module(*(x[:1] for x in inputs)), output[:1])


def refused_options():
    for table, cases in ((SIMILARITIES, SIMILARITY_CASES), (NORMALIZERS, NORMALIZER_CASES)):
        for name, case in cases.items():
            for option, (value, message) in case.refused.items():
                yield table, name, option, value, message


@pytest.mark.parametrize(("table", "name", "option", "value", "message"), list(refused_options()))
def test_options_out_of_range_are_refused(table, name, option, value, message):
    size = (D,) if table is SIMILARITIES else ()
    with pytest.raises(ValueError, match=message):
        table[name](*size, **{option: value})
