"""The relations: which tokens play query, key and value, and which may meet."""

from visattn.core.attention.full import CrossAttention, SelfAttention

__all__ = ["RELATIONS", "CrossAttention", "SelfAttention"]

RELATIONS = {
    "self": SelfAttention,
    "cross": CrossAttention,
}
"""Relations by the name that configurations use."""
