"""The formula m = f_norm(f_sim(Q, K)) V on tokens; knows no image, no file, no model."""

from visattn.core.attention import RELATIONS, CrossAttention, SelfAttention
from visattn.core.formula import Attend, Plan, attend, attention_map, plan
from visattn.core.normalize import NORMALIZERS, Normalizer
from visattn.core.similarity import SIMILARITIES, Similarity
from visattn.core.tap import Tap

__all__ = [
    "NORMALIZERS",
    "RELATIONS",
    "SIMILARITIES",
    "Attend",
    "CrossAttention",
    "Normalizer",
    "Plan",
    "SelfAttention",
    "Similarity",
    "Tap",
    "attend",
    "attention_map",
    "plan",
]
