"""Insert attention blocks into any network, remove them, and replace the ones it has."""

from visattn.surgery.inserted import Inserted, insert, remove
from visattn.surgery.swap import replace

__all__ = ["Inserted", "insert", "remove", "replace"]
