"""Subclasses and plans: a class with a formula of its own is evaluated by it, and plan tells what runs."""

import pytest
import torch
from core_cases import make_similarity

from visattn.blocks.catalog import create_block
from visattn.core.attention import RELATIONS
from visattn.core.evaluation import EVALUATIONS
from visattn.core.formula import Attend, attend, attention_map, plan
from visattn.core.normalize import NORMALIZERS
from visattn.core.position import POSITIONS, grid_coordinates
from visattn.core.similarity import SIMILARITIES
from visattn.core.similarity.features import Linear
from visattn.core.similarity.product import ScaledDot

HEAD_DIM = 12
HEADS = 2
GRID = (3, 5)


def doubled(similarity):
    """Return a subclass of a similarity whose scores are twice as large."""

    class Doubled(similarity):
        def forward(self, q, k):
            return 2 * super().forward(q, k)

    return Doubled


def squared(normalizer):
    """Return a subclass of a normalizer whose weights are squared."""

    class Squared(normalizer):
        def weights(self, e, count):
            return super().weights(e, count).square()

    return Squared


def qkv(heads=HEADS, tokens=15):
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, heads, tokens, HEAD_DIM), (2, heads, tokens, HEAD_DIM), (2, heads, tokens, 7)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


@pytest.mark.parametrize("name", SIMILARITIES)
def test_a_similarity_with_its_own_forward_is_evaluated_by_it(name):
    q, k, v = qkv()
    mine = doubled(SIMILARITIES[name])(HEAD_DIM, HEADS).double()
    e = 2 * SIMILARITIES[name].forward(mine, q, k)
    for normalizer in ("softmax", "l1", "none", "entmax15"):
        normalize = NORMALIZERS[normalizer](HEADS)
        torch.testing.assert_close(attend(q, k, v, mine, normalize), normalize(e) @ v)
    assert plan(q, k, v, mine).impl == "blocked"


@pytest.mark.parametrize("name", NORMALIZERS)
def test_a_normalizer_with_its_own_weights_is_evaluated_by_them(name):
    q, k, v = qkv()
    mine = squared(NORMALIZERS[name])(HEADS).double().eval()
    expected = NORMALIZERS[name](HEADS).double().eval()
    expected.load_state_dict(mine.state_dict())
    similarity = make_similarity("linear", HEAD_DIM, HEADS)
    alpha = expected(similarity(q, k)).square()
    torch.testing.assert_close(attend(q, k, v, similarity, mine), alpha @ v)


def test_a_form_of_its_own_is_not_taken_for_nonnegative():
    class Signed(Linear):
        def dot_form(self, q, k):
            return q, k, None

    q, k, v = qkv()
    normalize = NORMALIZERS["l1"]()
    assert plan(q, k, v, Signed(HEAD_DIM), normalize).impl == "blocked"
    expected = attend(q, k, v, Signed(HEAD_DIM), normalize, impl="dense")
    torch.testing.assert_close(attend(q, k, v, Signed(HEAD_DIM), normalize), expected)


@pytest.mark.parametrize("position", POSITIONS)
def test_a_similarity_with_its_own_forward_under_each_position(position):
    dim = HEADS * HEAD_DIM
    relation = RELATIONS["self"](
        dim,
        HEADS,
        similarity=doubled(ScaledDot)(HEAD_DIM, HEADS),
        position=POSITIONS[position](HEAD_DIM, HEADS, GRID),
    ).double()
    plain = RELATIONS["self"](
        dim,
        HEADS,
        similarity=ScaledDot(HEAD_DIM, HEADS),
        position=POSITIONS[position](HEAD_DIM, HEADS, GRID),
    ).double()
    plain.load_state_dict(relation.state_dict(), strict=False)
    x = torch.randn(2, 15, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    scores = {}
    for name, module in (("mine", relation), ("plain", plain)):
        q, k, _ = module.qkv(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        q, k, bias = module.position(q, k, grid_coordinates(GRID))
        e = module.attend.similarity(q, k)
        scores[name] = (e if bias is None else e + bias, q, k)
    e, q, k = scores["plain"]
    # The similarity's own part counts twice; what the position adds counts once.
    own = (q[..., :HEAD_DIM] @ k[..., :HEAD_DIM].transpose(-2, -1)) * HEAD_DIM**-0.5
    torch.testing.assert_close(scores["mine"][0], e + own)
    v = relation.qkv(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)[2]
    m = (e + own).softmax(-1) @ v
    expected = relation.proj(m.transpose(1, 2).flatten(2))
    torch.testing.assert_close(relation(x, grid=GRID), expected)


@pytest.mark.parametrize("name", ["pam", "non_local", "danet", "xca", "cam", "efficient", "bot"])
@pytest.mark.parametrize("side", [5, 9])
def test_plan_of_a_block_names_what_runs(name, side, monkeypatch):
    block = create_block(name, 16).eval()
    attends = [module for module in block.modules() if isinstance(module, Attend)]
    planned, ran = [], []
    for module in attends:
        module.register_forward_pre_hook(
            lambda attend, args, kwargs: planned.append(attend.plan(*args, **kwargs).impl),
            with_kwargs=True,
        )
    for evaluation in EVALUATIONS:
        run = evaluation.run

        def spied(call, name=evaluation.name, run=run):
            ran.append(name)
            return run(call)

        monkeypatch.setitem(evaluation.__dict__, "run", spied)
    block(torch.randn(1, 16, side, side + 2))
    assert planned == ran and len(ran) == len(attends)


def test_small_scores_are_formed_whole_where_a_module_asks_for_it():
    q, k, v = (x.float() for x in qkv(heads=1))
    scores = 2 * 15 * 15 * 4  # bytes
    for limit, impl in ((scores, "dense"), (scores - 1, "sdpa"), (0, "sdpa")):
        module = Attend(dense_below=limit)
        assert module.plan(q, k, v).impl == impl
        torch.testing.assert_close(module(q, k, v), attention_map(q, k) @ v)
