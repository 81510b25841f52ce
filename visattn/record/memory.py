"""Give freed memory back while a large model is watched."""

import ctypes
import sys
from functools import cache

from torch import Tensor

LARGE = 2**20  # bytes of one layer's output, below which there is little to give back


def give_back(x: Tensor):
    """Return freed memory to the system where x is large and the C library can: glibc's.

    What a layer frees leaves holes. What is kept of the next layer lies in them, and its
    activations find no room
    there: a process would grow by both, by a third more than it holds.
    """
    trim = _trim()
    if trim is not None and x.device.type == "cpu" and x.nbytes > LARGE:
        trim(0)


@cache
def _trim():
    return getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
