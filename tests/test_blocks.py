"""The contract of every attention block: what holds for one holds for all in BLOCKS."""

import copy
import inspect
import json
import pickle
import re
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from block_builds import FIRST, assert_close, build, call_with, inputs, recorded, seams, seeded
from block_cases import CASES, REFUSALS
from block_parity import PARITY, TIMM
from block_twins import TWINS
from torch.func import functional_call

from visattn.blocks.catalog import BLOCKS, create_block
from visattn.blocks.reference import load_reference

FAMILIES = {"channel", "spatial", "both", "branch", "token", "context"}
every_case = pytest.mark.parametrize("case", CASES, ids=str)
every_block = pytest.mark.parametrize("case", FIRST, ids=str)


# Everything is listed


def test_every_block_has_a_case_and_a_proof():
    assert {case.name for case in CASES} == set(BLOCKS)
    assert {parity.name for parity in PARITY} | set(TWINS) == set(BLOCKS)
    assert {timm_case.name for timm_case in TIMM} | {name for name, *_ in REFUSALS} <= set(BLOCKS)


def test_every_parity_file_is_used():
    used = {parity.file for parity in PARITY}
    assert used == {path.name for path in (Path(__file__).parent / "parity").glob("*.npz")}


def test_the_table_prints_one_line_per_block():
    header, *lines = str(BLOCKS).splitlines()
    assert header.split() == ["name", "class", "family", "year", "paper"]
    assert [line.split()[0] for line in lines] == list(BLOCKS)


@pytest.mark.parametrize("name", BLOCKS)
def test_entry(name):
    entry = BLOCKS[name]
    assert entry.family in FAMILIES and 2017 <= entry.year <= 2026 and len(entry.paper) > 10
    documentation = " ".join((entry.block.__doc__ or "").split())
    for section in (
        ".. math::",
        "Args:",
        "Shape:",
        "Map:",
        "Reference:",
        "Differs from",
        "http",
        ">>>",
    ):
        assert section in documentation, f"{entry.block.__name__} does not say {section}"


# Right values


@pytest.mark.parametrize("parity", PARITY, ids=str)
def test_parity(parity):
    data = np.load(Path(__file__).parent / "parity" / parity.file)
    meta = json.loads(str(data["meta"]))
    state = {key[6:]: torch.from_numpy(data[key]) for key in data.files if key.startswith("param/")}
    tensors = [
        as_map(data[key], parity.layout) for key in sorted(data.files) if key.startswith("in/0/")
    ]
    block = create_block(parity.name, parity.channels, **parity.options).eval()
    load_reference(block, state, parity.source)
    with torch.no_grad():
        output, maps = recorded(block, tensors)
    assert meta["repo"]
    assert_close(output, as_map(data["out/0/0"], parity.layout))
    for theirs, ours in parity.maps.items():
        assert_close(maps[ours][1].flatten(), torch.from_numpy(data[f"aux/0/{theirs}"]).flatten())


def as_map(array, layout):
    """A reference tensor as (B, C, H, W)."""
    tensor = torch.from_numpy(array)
    if layout == "tokens":
        side = round(tensor.size(1) ** 0.5)
        return tensor.transpose(1, 2).reshape(tensor.size(0), tensor.size(2), side, side)
    return tensor.permute(0, 3, 1, 2) if layout == "last" else tensor


def import_string(path):
    """The object at a dotted path."""
    module, _, name = path.rpartition(".")
    return getattr(import_module(module), name)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("case", TIMM, ids=str)
def test_equal_to_timm(case, training):
    layer = import_string(f"timm.layers.{case.layer}")
    # In float64: batch norm of pooled values magnifies the rounding of float32 where images are
    # alike.
    theirs = seeded(layer(**case.arguments)).train(training).double()
    ours = create_block(case.name, case.channels, **case.options).train(training).double()
    load_reference(ours, theirs.state_dict(), "timm")
    for height, width in [(7, 11), (1, 13), (31, 17)]:
        generator = torch.Generator().manual_seed(height)
        x = torch.randn(3, case.channels, height, width, generator=generator, dtype=torch.float64)
        a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
        left, right = ours(a), theirs(b)
        assert_close(left, right)
        left.square().sum().backward()
        right.square().sum().backward()
        assert_close(a.grad, b.grad, 1e-4)


@pytest.mark.parametrize(
    ("name", "channels", "options"),
    [(n, *example) for n, (_, examples) in TWINS.items() for example in examples],
    ids=str,
)
def test_equal_to_twin(name, channels, options):
    block = seeded(create_block(name, channels, **options).double()).eval()
    case = next(case for case in CASES if case.name == name)
    generator = torch.Generator().manual_seed(2)
    tensors = [
        torch.randn(s, generator=generator, dtype=torch.float64)
        for s in case.shapes(2, channels, 5, 8)
    ]
    state = {key: value.numpy() for key, value in block.state_dict().items()}
    expected = TWINS[name][0](state, *(t.numpy().copy() for t in tensors), channels, **options)
    with torch.no_grad():
        assert_close(block(*tensors), torch.from_numpy(expected), 1e-6)


# Shapes, types, copies


@every_case
@pytest.mark.parametrize("size", [(7, 11), (1, 1), (1, 13), (3, 2), (31, 17)], ids=str)
def test_any_size(case, size):
    block, tensors = (
        build(case).eval(),
        [torch.randn(s) for s in case.shapes(2, case.channels, *size)],
    )
    if size in case.refused_sizes or case.only_size not in ((), size):
        with pytest.raises(ValueError, match=r"\d"):
            block(*tensors)
        return
    output = block(*tensors)
    assert output.shape == tensors[0].shape and output.dtype == torch.float32
    assert output.isfinite().all()


@every_case
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_keeps_dtype(case, dtype):
    output = build(case, dtype).eval()(*inputs(case, dtype=dtype))
    assert output.dtype == dtype and output.isfinite().all()


@every_case
def test_trains_on_one_image(case):
    block, tensors = build(case).train(), inputs(case, batch=1)
    if case.batch_one:
        with pytest.raises(ValueError, match=case.batch_one):
            block(*tensors)
    else:
        assert block(*tensors).isfinite().all()


@every_case
def test_copies_agree(case):
    block, tensors = build(case).eval(), inputs(case)
    expected = block(*tensors)
    fresh = create_block(case.name, case.channels, **case.options).eval()
    fresh.load_state_dict(block.state_dict())
    for twin in (copy.deepcopy(block), pickle.loads(pickle.dumps(block)), fresh):
        torch.testing.assert_close(twin(*tensors), expected, rtol=0, atol=0)


@every_case
def test_runs_on_meta(case):
    with torch.device("meta"):
        block = create_block(case.name, case.channels, **case.options)
    tensors = [t.to("meta") for t in inputs(case)]
    output = block(*tensors)
    assert output.is_meta and output.shape == tensors[0].shape


@every_case
def test_keeps_channels_last(case):
    block, tensors = build(case).eval(), inputs(case)
    expected = block(*tensors)
    output = block(*(t.to(memory_format=torch.channels_last) for t in tensors))
    assert output.is_contiguous(memory_format=torch.channels_last)
    assert_close(output, expected, 1e-4)
    assert expected.is_contiguous()


@every_case
def test_autocast_is_close(case):
    block, tensors = build(case).eval(), inputs(case)
    expected = block(*tensors)
    with torch.autocast("cpu", torch.bfloat16):
        output = block(*tensors)
    assert output.dtype in (torch.float32, torch.bfloat16)
    assert (output.float() - expected).norm() < 0.05 * expected.norm()


# Behaviour


@every_case
def test_repeatable_and_leaves_input_alone(case):
    block, tensors = build(case).eval(), inputs(case)
    before = [t.clone() for t in tensors]
    torch.testing.assert_close(block(*tensors), block(*tensors), rtol=0, atol=0)
    for tensor, copy_ in zip(tensors, before, strict=True):
        torch.testing.assert_close(tensor, copy_, rtol=0, atol=0)


@every_case
def test_images_are_independent(case):
    block, tensors = build(case).eval(), inputs(case, batch=3)
    assert_close(block(*(t[1:2] for t in tensors)), block(*tensors)[1:2])


@every_case
def test_every_parameter_learns(case):
    block, tensors = build(case).train(), [t.requires_grad_() for t in inputs(case, batch=3)]
    for seed in range(5):  # one hidden unit may be dead under a single seed
        output = seeded(block, seed)(*tensors)
        (
            output * torch.randn(output.shape, generator=torch.Generator().manual_seed(seed))
        ).sum().backward()
    for name, value in [
        *block.named_parameters(),
        *((f"input {i}", t) for i, t in enumerate(tensors)),
    ]:
        assert value.grad is not None and value.grad.isfinite().all(), name
        assert value.grad.abs().max() > 0, name


@pytest.mark.parametrize("case", [case for case in CASES if case.smooth], ids=str)
def test_gradient_is_right(case):
    block = build(case, torch.float64).eval()
    names, values = (
        zip(*block.named_parameters(), strict=True) if list(block.parameters()) else ((), ())
    )
    tensors = [t.requires_grad_() for t in inputs(case, 2, 4, 5, torch.float64)]

    def run(*arguments):
        parameters = dict(zip(names, arguments[len(tensors) :], strict=True))
        return functional_call(block, parameters, arguments[: len(tensors)])

    assert torch.autograd.gradcheck(run, (*tensors, *values), fast_mode=True)


@pytest.mark.parametrize("case", [case for case in CASES if case.pixels], ids=str)
def test_commutes_with_a_shuffle_of_positions(case):
    block, (x,) = build(case).eval(), inputs(case)
    order = torch.randperm(x.size(2) * x.size(3), generator=torch.Generator().manual_seed(4))
    shuffled = x.flatten(2)[..., order].reshape(x.shape)
    assert_close(block(shuffled), block(x).flatten(2)[..., order].reshape(x.shape))


# Maps


@every_case
def test_maps_have_their_kinds(case):
    block, tensors = build(case).eval(), inputs(case)
    output, maps = recorded(block, tensors)
    torch.testing.assert_close(block(*tensors), output, rtol=0, atol=0)
    assert tuple(kind for kind, _ in maps) == case.maps
    ranks = {"channel": 4, "spatial": 4, "branch": 5, "token": 4}
    for kind, alpha in maps:
        if alpha is not None:
            assert alpha.dim() == ranks[kind] and alpha.size(0) == 2 and alpha.isfinite().all()
            assert kind != "channel" or alpha.shape[1:] == (case.channels, 1, 1)
    for index, axes in case.sums:
        total = maps[index][1].sum(axes)
        assert_close(total, torch.ones_like(total))


@every_case
def test_maps_act(case):
    block, tensors = build(case).eval(), inputs(case)
    expected = block(*tensors)
    assert seams(block)
    for name, seam in seams(block).items():
        changed = call_with(seam, lambda alpha: alpha * 0.5, block, tensors)
        assert (changed - expected).abs().max() > 1e-4, f"{name} is not what is applied"


# Refusals


@pytest.mark.parametrize(("name", "channels", "options", "message"), REFUSALS, ids=str)
def test_refuses(name, channels, options, message):
    with pytest.raises(ValueError, match=message):
        create_block(name, channels, **options)


@every_block
def test_refuses_wrong_inputs(case):
    block, tensors = build(case).eval(), inputs(case)
    wrong = torch.zeros(2, case.channels + 1, 7, 11)
    for bad in (wrong, wrong[0], tensors[0].flatten(2)):
        with pytest.raises(
            ValueError, match=rf"{case.channels}.*{re.escape(str(tuple(bad.shape)))}"
        ):
            block(bad, *tensors[1:])


@pytest.mark.parametrize("name", BLOCKS)
def test_refuses_even_kernels(name):
    """Every kernel of which a block has a choice; those of lka and lska go by kernel_size / dilation, see REFUSALS."""
    parameters = inspect.signature(BLOCKS[name].block).parameters
    extents = (
        {"kernel_size", "spatial_kernel_size"} & set(parameters)
        if name not in ("lka", "lska", "lka_attention")
        else ()
    )
    case = next(case for case in CASES if case.name == name)
    for extent in extents:
        with pytest.raises(ValueError, match=f"{extent} must be odd.*got 4"):
            create_block(name, case.channels, **{**case.options, extent: 4})


@pytest.mark.parametrize("name", BLOCKS)
def test_fewer_channels_than_the_reduction_leave_one_hidden_or_are_refused(name):
    """A bottleneck never loses its last channel silently."""
    if "reduction" not in inspect.signature(BLOCKS[name].block).parameters:
        return
    case = next(case for case in CASES if case.name == name)
    options = {**case.options, "reduction": 2 * case.channels}
    try:
        block = create_block(name, case.channels, **options).eval()
    except ValueError as error:
        assert re.search(r"channels must be a multiple of .*reduction", str(error))
        return
    assert all(value.numel() for value in block.parameters())
    assert block(*inputs(case)).isfinite().all()


def test_refuses_unknown_names_and_options():
    with pytest.raises(ValueError, match=r"unknown block 'sse'; did you mean .*'se'"):
        create_block("sse", 12)
    with pytest.raises(ValueError, match="no option 'reductoin'; did you mean 'reduction'"):
        create_block("se", 12, reductoin=4)


def test_load_reference_refuses_what_does_not_fit():
    block = create_block("se", 32, reduction=8)
    with pytest.raises(ValueError, match="known sources: paper, timm"):
        load_reference(block, {}, "tim")
    with pytest.raises(ValueError, match=r"missing \['fc1.bias', .*unexpected \['extra'\]"):
        load_reference(block, {"fc.0.weight": torch.zeros(4, 32), "extra": torch.zeros(1)}, "paper")
    with pytest.raises(ValueError, match=r"fc1.weight: expected shape \(4, 32\), got \(8, 32\)"):
        weights = {"fc1.weight": torch.zeros(8, 32), "fc1.bias": torch.zeros(4)}
        load_reference(
            block,
            {**weights, "fc2.weight": torch.zeros(32, 4), "fc2.bias": torch.zeros(32)},
            "timm",
        )
