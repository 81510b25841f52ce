"""Watching a model leaves it as it was."""

import pytest
import torch
from torch import nn

from visattn.tracing import CallTracer, evaluating, modules_of


def modes_of(model: nn.Module) -> list[bool]:
    return [module.training for module in model.modules()]


def test_an_error_inside_restores_frozen_layers_in_a_model_that_trains():
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Dropout(), nn.BatchNorm1d(2)))
    model[1][1].eval()
    modes = modes_of(model)
    assert modes == [True, True, True, True, False]
    with pytest.raises(RuntimeError, match="stop"), evaluating(model):
        assert not any(modes_of(model))
        raise RuntimeError("stop")
    assert modes_of(model) == modes


class Forgiving(nn.Module):
    """Catches what its first layer raises, and runs its second."""

    def __init__(self):
        super().__init__()
        self.broken = nn.Sequential(nn.Linear(2, 3), nn.Linear(5, 3))
        self.sound = nn.Linear(2, 4)

    def forward(self, x):
        try:
            return self.broken(x)
        except RuntimeError:
            return self.sound(x)


def test_calls_stay_nested_behind_an_exception_inside():
    model = Forgiving()
    tree = []

    def enter(call, parent):
        (tree if parent is None else parent.inner).append(call)

    tracer = CallTracer(modules_of(model), enter, lambda call: None)
    x = torch.rand(1, 2)
    model(x)
    (root,) = tree
    assert [call.name for call in root.inner] == ["broken", "sound"]
    assert [call.name for call in root.inner[0].inner] == ["broken.0", "broken.1"]
    assert root.inner[0].output is None and root.inner[0].inner[1].output is None
    assert root.output is root.inner[1].output and root.inputs == (x,)
    assert not tracer.running
    tracer.close()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_listener_replaces_an_output():
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU())
    tracer = CallTracer(
        modules_of(model),
        lambda call, parent: None,
        lambda call: call.output - 1e3 if call.name == "0" else None,
    )
    assert not model(torch.rand(4, 2)).any()
    tracer.close()


def test_the_names_are_those_of_named_modules():
    shared = nn.Linear(2, 2)
    model = nn.Sequential(nn.Sequential(shared, nn.ReLU()), nn.ModuleDict({"a": shared}), None)
    assert modules_of(model) == list(model.named_modules())
