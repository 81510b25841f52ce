"""Does the map tell the truth? Measures of faithfulness, of place, and of sanity."""

from visattn.metrics.pixels import deletion, insertion, perturbation
from visattn.metrics.sanity_checks import max_sensitivity, rank_correlation, sanity
from visattn.metrics.truth import (
    Segmentation,
    boxes_to_masks,
    energy_pointing,
    grid_pointing,
    pointing_game,
    segmentation,
)

__all__ = [
    "Segmentation",
    "boxes_to_masks",
    "deletion",
    "energy_pointing",
    "grid_pointing",
    "insertion",
    "max_sensitivity",
    "perturbation",
    "pointing_game",
    "rank_correlation",
    "sanity",
    "segmentation",
]
