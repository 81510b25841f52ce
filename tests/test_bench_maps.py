"""`visattn bench maps`: the contestants compute the same, and the table says which needs less."""

import pytest
import timm
import torch

from visattn.__main__ import make_app
from visattn.bench import maps
from visattn.bench.timing import Timing


@pytest.fixture
def small():
    torch.manual_seed(0)
    return timm.create_model(
        "vit_tiny_patch16_224", depth=2, dynamic_img_size=True
    ).eval(), torch.rand(1, 3, 48, 80)


def test_the_row_chain_and_the_eager_way_agree(small):
    torch.testing.assert_close(maps._rollout(*small).values.flatten(1), maps._eager_rollout(*small))
    expected = maps._eager_gae(*small)
    torch.testing.assert_close(
        maps._gae(*small).values.flatten(1), expected, rtol=1e-3, atol=1e-5 * expected.max()
    )
    with torch.no_grad():
        weights, logits = maps._eager(*small)
        for heat, alpha in zip(maps._class_rows(*small), weights, strict=True):
            torch.testing.assert_close(heat.values.flatten(1), alpha.mean(1)[:, 0, 1:])
        torch.testing.assert_close(maps._plain(*small), logits)


@pytest.mark.parametrize(
    ("words", "sizes", "options"),
    [([], (), {}), (["64", "96", "--largest", "0"], (64, 96), {"largest": 0})],
    ids=["left out", "given"],
)
def test_sizes_may_be_given_or_left_out(words, sizes, options):
    words = ["bench", "maps", *words]
    command, bound, _ = make_app(words).parse_args(words)
    assert command is maps.run
    assert (bound.args, bound.kwargs) == ((sizes,) if sizes else (), options)


def test_rows_are_compared_in_percent_and_methods_in_times():
    times = {
        name: Timing(ms, ms, ms) for name, ms in (("plain forward", 100), ("class-token rows", 104))
    }
    times |= {"rollout": Timing(50, 49, 51), "eager rollout": Timing(85, 80, 90)}
    memory = {
        "plain forward": 30.0,
        "class-token rows": 31.0,
        "rollout": 20.0,
        "eager rollout": 140.0,
    }
    assert maps._compare("plain forward", times, memory) == ("", "", "")
    assert maps._compare("class-token rows", times, memory) == (
        "plain forward",
        "+4.0 %",
        "+1 MiB",
    )
    assert maps._compare("rollout", times, memory) == (
        "eager rollout",
        "1.70x as fast",
        "7.0x less",
    )
