"""Positions of tokens on a grid, given to queries and keys (a rotation) or to scores (a bias)."""

from visattn.core.position.bias import Alibi, LogCpb, RelativeTable
from visattn.core.position.coordinates import Coordinates, grid_coordinates
from visattn.core.position.decomposed import Decomposed
from visattn.core.position.definition import Position
from visattn.core.position.rope import Rope

__all__ = ["POSITIONS", "Coordinates", "Position", "grid_coordinates"]

POSITIONS = {
    "rope": Rope,
    "alibi": Alibi,
    "relative": RelativeTable,
    "log_cpb": LogCpb,
    "decomposed": Decomposed,
}
"""Positions by the name that configurations use: class(head_dim, num_heads=1, grid=None, *, options)."""
