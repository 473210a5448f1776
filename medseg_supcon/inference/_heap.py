"""On a CPU: freed memory is kept for the next window instead of going back to the system and coming anew.

Each layer's output is tens of MB, which glibc takes from the system and returns every time; for windows of 96^3
voxels the page faults of that cost as much as a third of the convolutions.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
KEPT = 2**30  # bytes; one allocation above this still comes from the system
USUAL = 2**25  # where glibc's own, growing threshold ends on a 64-bit system


@contextmanager
def keep_freed_memory(wanted: bool) -> Iterator[None]:
    """Until the end, large blocks that are freed stay in the process; then they all go back.

    Does nothing if not ``wanted``, or where the C library is not glibc.
    """
    libc = _glibc() if wanted else None
    if libc is None:
        yield
        return
    libc.mallopt(M_MMAP_THRESHOLD, KEPT)
    libc.mallopt(M_TRIM_THRESHOLD, KEPT)
    try:
        yield
    finally:
        libc.mallopt(M_MMAP_THRESHOLD, USUAL)
        libc.mallopt(M_TRIM_THRESHOLD, 2 * USUAL)
        libc.malloc_trim(0)


@cache
def _glibc() -> ctypes.CDLL | None:
    if not sys.platform.startswith("linux"):
        return None
    try:
        libc = ctypes.CDLL("libc.so.6")
        return libc if libc.mallopt and libc.malloc_trim else None
    except (OSError, AttributeError):  # another C library
        return None
