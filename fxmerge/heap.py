"""Freed memory, given back to the system: what a process that streams tensors takes is then what it holds."""

from __future__ import annotations

import ctypes
import sys

LARGE = 2**20
"""Bytes of a tensor for which that is worth its 0.2 ms."""

_trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None


def give_back() -> None:
    """Once a large block was freed, glibc keeps blocks of up to 32 MB in its heap, in pieces that others do not fit.

    Other allocators are left to themselves.
    """
    if _trim is not None:
        _trim(0)
