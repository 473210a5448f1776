"""What to do when memory runs out: less at a time, then the CPU. Other errors pass."""

from __future__ import annotations

from collections.abc import Iterator
from types import TracebackType

import torch

ALLOCATORS = ("DefaultCPUAllocator", "bad_alloc")


class Attempt:
    """One way to spend memory: where the network works, where windows are stitched, how many go together."""

    def __init__(self, device: torch.device, buffers: torch.device, batch: int, last: bool) -> None:
        self.device, self.buffers, self.batch, self.last = device, buffers, batch, last
        self.failed = False

    def __enter__(self) -> Attempt:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: TracebackType | None) -> bool:
        self.failed = error is not None and is_out_of_memory(error) and not self.last
        return self.failed


def is_out_of_memory(error: BaseException) -> bool:
    """Out of memory on a GPU, in torch's CPU allocator, in numpy, or in what config machinery wrapped around it.

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
    ways = [(device, device, batch), (device, cpu, batch), (device, cpu, 1), (cpu, cpu, 1)]
    ways = list(dict.fromkeys(ways))
    for index, way in enumerate(ways):
        attempt = Attempt(*way, last=index == len(ways) - 1)
        yield attempt
        if not attempt.failed:
            return
        if device.type == "cuda":
            torch.cuda.empty_cache()
        warnings.append(f"memory ran out on {way[0]}: tried again with less")
