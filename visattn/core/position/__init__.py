"""Positions of tokens on a grid, given to queries and keys (a rotation) or to scores (a bias)."""

from torch import nn

from visattn.core.position.bias import Alibi, LogCpb, RelativeTable
from visattn.core.position.coordinates import Coordinates, grid_coordinates
from visattn.core.position.decomposed import Decomposed, widen
from visattn.core.position.rope import Rope
from visattn.core.similarity.definition import Similarity

__all__ = ["POSITIONS", "Coordinates", "adapt", "grid_coordinates"]

POSITIONS = {
    "rope": Rope,
    "alibi": Alibi,
    "relative": RelativeTable,
    "log_cpb": LogCpb,
    "decomposed": Decomposed,
}
"""Positions by the name that configurations use: class(head_dim, num_heads=1, grid=None, *, options)."""


def adapt(similarity: Similarity | None, position: nn.Module | None) -> Similarity | None:
    """Return the similarity that reads what the position gives."""
    return widen(similarity, position.head_dim) if isinstance(position, Decomposed) else similarity
