"""The relations: which tokens play query, key and value, and which may meet."""

from visattn.core.attention.axial import AxialAttention, CrissCrossAttention
from visattn.core.attention.channel import ChannelAttention
from visattn.core.attention.full import CrossAttention, SelfAttention
from visattn.core.attention.learned import ClassAttention, MemoryAttention, PoolAttention
from visattn.core.attention.local import (
    GridAttention,
    NeighborhoodAttention,
    ShiftedWindowAttention,
    WindowAttention,
)

__all__ = ["RELATIONS", "CrossAttention", "SelfAttention"]

RELATIONS = {
    "self": SelfAttention,
    "cross": CrossAttention,
    "class": ClassAttention,
    "pool": PoolAttention,
    "memory": MemoryAttention,
    "window": WindowAttention,
    "shifted_window": ShiftedWindowAttention,
    "grid": GridAttention,
    "axial": AxialAttention,
    "criss_cross": CrissCrossAttention,
    "neighborhood": NeighborhoodAttention,
    "channel": ChannelAttention,
}
"""Relations by the name that configurations use."""
