"""Norms inside blocks are modules like others: converted, frozen or averaged from outside, they do what they are."""

import copy

import pytest
import torch
from block_builds import assert_close, build, inputs
from block_cases import CASES
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from visattn.blocks.parts import norm


def norms(block):
    return [part for part in block.modules() if isinstance(part, _BatchNorm)]


normed = pytest.mark.parametrize("case", [case for case in CASES if norms(build(case))], ids=str)


@pytest.fixture(params=["small", "large"])
def size(request, monkeypatch):
    """What a map counts as: a large one is normalized by other means."""
    if request.param == "large":
        monkeypatch.setattr(norm, "_LARGE", 0)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@normed
def test_synchronized_norms_change_nothing_in_one_process(case, training, size):
    block, tensors = build(case).train(training), inputs(case, batch=3)
    twin = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(block))
    assert all(isinstance(part, nn.SyncBatchNorm) for part in norms(twin))
    assert_close(twin(*tensors), block(*tensors))
    for key, value in block.state_dict().items():
        assert_close(twin.state_dict()[key], value)


@normed
def test_frozen_norms_keep_their_statistics(case, size):
    block, tensors = build(case).eval(), inputs(case)
    state, expected = copy.deepcopy(block.state_dict()), block(*tensors)
    block.train()
    for part in norms(block):
        part.eval()
    assert_close(block(*tensors), expected)
    for key, value in block.state_dict().items():
        assert torch.equal(value, state[key]), key


@normed
def test_without_momentum_the_first_batch_is_the_average(case, size):
    found = []
    for momentum in (None, 1.0):  # None: an average over all batches, as torch's update_bn sets it
        block = build(case).train()
        for part in norms(block):
            part.reset_running_stats()
            part.momentum = momentum
        block(*inputs(case, batch=3))
        found.append(block.state_dict())
    for key, value in found[0].items():
        assert_close(value, found[1][key])
