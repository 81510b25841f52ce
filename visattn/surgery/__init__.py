"""Put attention blocks into networks that stand, take them out again, and swap the ones they have."""

from visattn.surgery.inserted import Inserted, insert, remove
from visattn.surgery.swap import replace

__all__ = ["Inserted", "insert", "remove", "replace"]
