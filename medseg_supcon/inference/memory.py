"""If memory runs out: less at a time, then the CPU. Other errors pass."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from types import TracebackType

import torch

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
KEPT = 2**30  # bytes; one allocation above this still comes from the system
USUAL = 2**25  # where glibc's own, growing threshold ends on a 64-bit system


@contextmanager
def keep_freed_memory(wanted: bool) -> Iterator[None]:
    """Inside, large blocks that are freed stay in the process; at the end they all go back.

    Does nothing if not ``wanted``, or if the C library is not glibc.
    """
    if not wanted:
        yield
        return
    tune_malloc(keep=True)
    try:
        yield
    finally:
        tune_malloc(keep=False)


def tune_malloc(*, keep: bool) -> bool:
    """Let glibc keep large blocks that are freed, or give them all back to the system and stop keeping them.

    Without this, their pages are mapped and cleared again at every use: a fifth of the time of a small network's
    training step on a CPU. It changes this process only.

    Returns:
        whether it took effect: False where the C library is not glibc.
    """
    libc = _glibc()
    if libc is None:
        return False
    done = bool(libc.mallopt(M_MMAP_THRESHOLD, KEPT if keep else USUAL))
    done = bool(libc.mallopt(M_TRIM_THRESHOLD, KEPT if keep else 2 * USUAL)) and done
    if not keep:
        libc.malloc_trim(0)
    return done


@cache
def _glibc() -> ctypes.CDLL | None:
    if not sys.platform.startswith("linux"):
        return None
    try:
        libc = ctypes.CDLL("libc.so.6")
        return libc if libc.mallopt and libc.malloc_trim else None
    except (OSError, AttributeError):  # another C library
        return None


ALLOCATORS = ("DefaultCPUAllocator", "bad_alloc")


class Attempt:
    """One use of memory: where the network runs, where windows are stitched, how many go together."""

    def __init__(self, device: torch.device, buffers: torch.device, batch: int, last: bool) -> None:
        self.device, self.buffers, self.batch, self.last = device, buffers, batch, last
        self.failed = False

    def __enter__(self) -> Attempt:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: TracebackType | None) -> bool:
        self.failed = error is not None and is_out_of_memory(error) and not self.last
        return self.failed


def is_out_of_memory(error: BaseException) -> bool:
    """Out of memory on a GPU, in torch's CPU allocator, in numpy, or wrapped in another error.

    Example:
        >>> is_out_of_memory(MemoryError()), is_out_of_memory(RuntimeError("CUDA error: device-side assert"))
        (True, False)
    """
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    if isinstance(error, RuntimeError) and any(words in str(error) for words in ALLOCATORS):
        return True
    cause = error.__cause__
    return cause is not None and cause is not error and is_out_of_memory(cause)


def attempts(device: torch.device, batch: int, warnings: list[str]) -> Iterator[Attempt]:
    """Attempts, each with less memory than the one before, until one ends without running out."""
    cpu = torch.device("cpu")
    plans = [(device, device, batch), (device, cpu, batch), (device, cpu, 1), (cpu, cpu, 1)]
    plans = list(dict.fromkeys(plans))
    for index, plan in enumerate(plans):
        attempt = Attempt(*plan, last=index == len(plans) - 1)
        yield attempt
        if not attempt.failed:
            return
        if device.type == "cuda":
            torch.cuda.empty_cache()
        warnings.append(f"out of memory on {plan[0]}: trying again with less memory")
