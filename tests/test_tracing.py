"""Watching a model leaves it as it was."""

import pytest
from torch import nn

from visattn.tracing import evaluating


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
