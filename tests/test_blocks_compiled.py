"""Every block under torch.compile, torch.export and ONNX, and on a GPU."""

import copy

import pytest
import torch
from block_builds import FIRST, assert_close, build, inputs
from block_cases import CASES

every_case = pytest.mark.parametrize("case", CASES, ids=str)
every_block = pytest.mark.parametrize("case", FIRST, ids=str)


@every_block
def test_compiles_to_one_graph(case):
    torch._dynamo.reset()
    block, tensors = build(case).train(), [t.requires_grad_() for t in inputs(case)]
    state = copy.deepcopy(block.state_dict())
    expected = block(*tensors)
    block.load_state_dict(state)
    output = torch.compile(block, fullgraph=True, backend="aot_eager")(*tensors)
    assert_close(output, expected)
    output.sum().backward()
    assert all(value.grad is not None for value in [*tensors, *block.parameters()])


def dynamic_shapes(tensors):
    dynamic = torch.export.Dim.DYNAMIC
    return tuple({0: dynamic, 2: dynamic, 3: dynamic} for _ in tensors)


@every_block
def test_exports_with_dynamic_sizes(case):
    block, tensors = build(case).eval(), inputs(case)
    with torch.no_grad():
        program = torch.export.export(
            block, tuple(tensors), dynamic_shapes=dynamic_shapes(tensors)
        ).module()
        for batch, height, width in [(1, 9, 6), (3, 20, 13)]:
            tensors = inputs(case, batch, height, width)
            assert_close(program(*tensors), block(*tensors))


@pytest.mark.slow
@every_block
def test_exports_to_onnx(case, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    block, tensors = build(case).eval(), inputs(case)
    path = tmp_path / "block.onnx"
    with torch.no_grad():
        torch.onnx.export(
            block,
            tuple(tensors),
            path,
            dynamo=True,
            dynamic_shapes=dynamic_shapes(tensors),
            verbose=False,
        )
        session = onnxruntime.InferenceSession(str(path))
        for batch, height, width in [(2, 7, 11), (3, 9, 6)]:
            tensors = inputs(case, batch, height, width)
            feed = {
                node.name: t.numpy() for node, t in zip(session.get_inputs(), tensors, strict=True)
            }
            assert_close(torch.from_numpy(session.run(None, feed)[0]), block(*tensors), 1e-4)


@pytest.mark.gpu
@every_case
def test_deterministic_on_cuda(case, monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    block, tensors = (
        build(case).cuda().train(),
        [t.cuda().requires_grad_() for t in inputs(case, 2, 14, 14)],
    )
    torch.use_deterministic_algorithms(True)
    try:
        gradients = []
        for _ in range(2):
            block.zero_grad()
            gradients.append(torch.autograd.grad(block(*tensors).square().sum(), tensors))
    finally:
        torch.use_deterministic_algorithms(False)
    for first, second in zip(*gradients, strict=True):
        torch.testing.assert_close(first, second, rtol=0, atol=0)


@pytest.mark.gpu
@every_case
def test_equal_on_cuda(case):
    block, tensors = build(case).eval(), inputs(case)
    expected = block(*tensors)
    assert_close(block.cuda()(*(t.cuda() for t in tensors)).cpu(), expected, 1e-3)
