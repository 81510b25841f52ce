"""The formula m = f_norm(f_sim(Q, K)) V on tokens; knows no image, no file, no model."""

from visattn.core.attention import RELATIONS
from visattn.core.attention.axial import AxialAttention, CrissCrossAttention, StripAttention
from visattn.core.attention.channel import ChannelAttention
from visattn.core.attention.full import CrossAttention, SelfAttention
from visattn.core.attention.learned import ClassAttention, MemoryAttention, PoolAttention
from visattn.core.attention.local import (
    GridAttention,
    NeighborhoodAttention,
    ShiftedWindowAttention,
    WindowAttention,
)
from visattn.core.formula import Attend, Plan, attend, attention_map, plan
from visattn.core.normalize import NORMALIZERS
from visattn.core.normalize.definition import Normalizer, SoftmaxForm
from visattn.core.normalize.doubly import Double, Sinkhorn
from visattn.core.normalize.exponential import Gumbel, Hard, Softmax, Softmax1, TopK
from visattn.core.normalize.linear import L1, Uniform
from visattn.core.normalize.pointwise import ReLU, Sigmoid
from visattn.core.normalize.sparse import Entmax, Entmax15, Sparsemax
from visattn.core.position import POSITIONS
from visattn.core.position.bias import Alibi, LogCpb, RelativeTable
from visattn.core.position.decomposed import Decomposed
from visattn.core.position.rope import Rope
from visattn.core.similarity import SIMILARITIES
from visattn.core.similarity.definition import Similarity
from visattn.core.similarity.distance import Laplacian, NegativeL2
from visattn.core.similarity.features import Efficient, Linear
from visattn.core.similarity.learned import Additive, Concat
from visattn.core.similarity.product import Bilinear, Cosine, Dot, ScaledDot
from visattn.core.tap import Tap

__all__ = [
    "L1",
    "NORMALIZERS",
    "POSITIONS",
    "RELATIONS",
    "SIMILARITIES",
    "Additive",
    "Alibi",
    "Attend",
    "AxialAttention",
    "Bilinear",
    "ChannelAttention",
    "ClassAttention",
    "Concat",
    "Cosine",
    "CrissCrossAttention",
    "CrossAttention",
    "Decomposed",
    "Dot",
    "Double",
    "Efficient",
    "Entmax",
    "Entmax15",
    "GridAttention",
    "Gumbel",
    "Hard",
    "Laplacian",
    "Linear",
    "LogCpb",
    "MemoryAttention",
    "NegativeL2",
    "NeighborhoodAttention",
    "Normalizer",
    "Plan",
    "PoolAttention",
    "ReLU",
    "RelativeTable",
    "Rope",
    "ScaledDot",
    "SelfAttention",
    "ShiftedWindowAttention",
    "Sigmoid",
    "Similarity",
    "Sinkhorn",
    "Softmax",
    "Softmax1",
    "SoftmaxForm",
    "Sparsemax",
    "StripAttention",
    "Tap",
    "TopK",
    "Uniform",
    "WindowAttention",
    "attend",
    "attention_map",
    "plan",
]
