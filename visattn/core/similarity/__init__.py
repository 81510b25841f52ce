"""f_sim, the similarities: the table of them and the definition they share."""

from visattn.core.similarity.definition import Similarity
from visattn.core.similarity.distance import Laplacian, NegativeL2
from visattn.core.similarity.features import Efficient, Linear
from visattn.core.similarity.learned import Additive, Concat
from visattn.core.similarity.product import Bilinear, Cosine, Dot, ScaledDot

__all__ = ["SIMILARITIES", "Similarity"]

SIMILARITIES = {
    "dot": Dot,
    "scaled_dot": ScaledDot,
    "cosine": Cosine,
    "bilinear": Bilinear,
    "additive": Additive,
    "concat": Concat,
    "negative_l2": NegativeL2,
    "laplacian": Laplacian,
    "linear": Linear,
    "efficient": Efficient,
}
"""Similarities by the name that configurations use."""
