"""The relations agree with timm and with the reference vectors."""

from pathlib import Path

import numpy as np
import pytest
import torch
from relation_cases import DIM, HEADS, TOKENS, build, numbers
from timm.layers import AttentionPoolLatent
from timm.models import swin_transformer as swin
from timm.models import swin_transformer_v2 as swin2
from timm.models.cait import ClassAttn
from timm.models.xcit import XCA

from visattn.core.attention import RELATIONS
from visattn.core.position.bias import LogCpb, RelativeTable
from visattn.core.similarity import SIMILARITIES

EXACT = {"rtol": 1e-10, "atol": 1e-10}
PARITY = Path(__file__).parent / "parity"


@pytest.mark.parametrize("shift", [0, 2])
def test_swin_windows_agree_with_timm(shift):
    theirs = (
        swin.SwinTransformerBlock(DIM, (8, 12), HEADS, window_size=4, shift_size=shift)
        .double()
        .eval()
    )
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
        theirs.logit_scale.copy_(
            torch.tensor([0.5, 3.0, 7.0])[:, None, None]
        )  # the last one lies above the bound
        theirs._init_buffers()
    theirs = theirs.double()
    f_sim = SIMILARITIES["cosine"](DIM // HEADS, HEADS)
    position = LogCpb(DIM // HEADS, HEADS, (4, 4))
    ours = RELATIONS["window"](
        DIM, HEADS, similarity=f_sim, window_size=4, position=position
    ).double()
    state = {
        f"position.mlp.{key[8:]}": value
        for key, value in theirs.state_dict().items()
        if "cpb_mlp" in key
    }
    state |= {"qkv.weight": theirs.qkv.weight, "attend.similarity.logit_scale": theirs.logit_scale}
    state |= {"qkv.bias": torch.cat([theirs.q_bias, torch.zeros(DIM), theirs.v_bias])}
    ours.load_state_dict(state | {"proj.weight": theirs.proj.weight, "proj.bias": theirs.proj.bias})
    x = numbers(2, 16, DIM)
    torch.testing.assert_close(ours(x, grid=(4, 4)), theirs(x), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "name, theirs, options",
    [
        ("class", lambda: ClassAttn(DIM, HEADS, qkv_bias=True), {}),
        (
            "pool",
            lambda: AttentionPoolLatent(
                DIM, num_heads=HEADS, latent_len=2, pool_type="", norm_layer=_norm
            ),
            {},
        ),
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


def assert_near(got, expected):
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
    assert_near(ours(x), expected)
    theirs = XCA(32, 4, qkv_bias=True)
    theirs.load_state_dict(weights)
    y = numbers(2, 7, 32, dtype=torch.float32)
    assert_near(ours(y), theirs(y))


@pytest.mark.parametrize("name, relation", [("danet_pam", "self"), ("criss_cross", "criss_cross")])
def test_segmentation_attention_agrees_with_the_authors(name, relation):
    """Queries and keys of fewer channels than the values are the same with zeros behind them."""
    x, expected, w = load(name)
    ours = RELATIONS[relation](32, 1, similarity=SIMILARITIES["dot"](32))
    qkv = [
        torch.nn.functional.pad(w[f"{p}_conv.weight"].flatten(1), (0, 0, 0, 28))
        for p in ("query", "key")
    ]
    bias = [torch.nn.functional.pad(w[f"{p}_conv.bias"], (0, 28)) for p in ("query", "key")]
    with torch.no_grad():
        ours.qkv.weight.copy_(torch.cat([*qkv, w["value_conv.weight"].flatten(1)]))
        ours.qkv.bias.copy_(torch.cat([*bias, w["value_conv.bias"]]))
        ours.proj.weight.copy_(torch.eye(32))
        ours.proj.bias.zero_()
    m = ours(x.flatten(2).transpose(1, 2), grid=(14, 14)).transpose(1, 2).unflatten(2, (14, 14))
    assert_near(w["gamma"] * m + x, expected)


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
    assert_near((torch.nn.functional.batch_norm(y, *statistics) + x).relu(), expected)
