"""What a model attended: capture() records it, on anyone's model."""

from visattn.record.entry import Record
from visattn.record.session import Maps, capture

__all__ = ["Maps", "Record", "capture"]
