"""f_norm, the normalizers: the table of them and the definition they share."""

from visattn.core.normalize.definition import Normalizer
from visattn.core.normalize.doubly import Double, Sinkhorn
from visattn.core.normalize.exponential import Gumbel, Hard, Softmax, Softmax1, TopK
from visattn.core.normalize.linear import L1, Uniform
from visattn.core.normalize.pointwise import ReLU, Sigmoid
from visattn.core.normalize.sparse import Entmax, Entmax15, Sparsemax

__all__ = ["NORMALIZERS", "Normalizer"]

NORMALIZERS = {
    "softmax": Softmax,
    "softmax1": Softmax1,
    "sparsemax": Sparsemax,
    "entmax15": Entmax15,
    "entmax": Entmax,
    "sigmoid": Sigmoid,
    "relu": ReLU,
    "topk": TopK,
    "hard": Hard,
    "gumbel": Gumbel,
    "l1": L1,
    "none": Uniform,
    "double": Double,
    "sinkhorn": Sinkhorn,
}
"""Normalizers by the name that configurations use."""
