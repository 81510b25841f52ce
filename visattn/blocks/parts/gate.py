"""The last function of a gate, by name."""

from torch import nn

from visattn.blocks.parts.check import require_choice

GATES = {"sigmoid": nn.Sigmoid, "hard_sigmoid": nn.Hardsigmoid, "tanh": nn.Tanh}


def make_gate(gate: str) -> nn.Module:
    """The gate activation called `gate`."""
    require_choice("gate", gate, GATES)
    return GATES[gate]()
