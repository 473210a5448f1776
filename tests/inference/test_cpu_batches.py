"""What a CPU does differently from a GPU: batches that fit its caches, and freed memory kept for the next batch."""

from __future__ import annotations

import ctypes.util
import resource
import sys
from pathlib import Path

import pytest
import torch

from medseg_supcon.inference import batch_on, keep_freed_memory

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(
    ("patch", "batch", "expected"),
    [
        ((56, 40, 40), 4, 4),
        ((96, 96, 96), 4, 2),
        ((160, 160, 160), 4, 2),
        ((96, 96, 96), 1, 1),
        ((8, 8, 8), 7, 7),
    ],
)
def test_a_cpu_takes_fewer_large_windows_at_once(patch: tuple[int, int, int], batch: int, expected: int) -> None:
    assert batch_on(CPU, batch, patch) == expected
    assert batch_on(CUDA, batch, patch) == batch


def page_faults(rounds: int = 20) -> int:
    """Page faults of writing to a new block of 48 MiB repeatedly: 12,288 each time if the memory is really new."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(rounds):
        torch.ones(12 * 2**20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


@pytest.mark.skipif(
    not sys.platform.startswith("linux") or ctypes.util.find_library("c") != "libc.so.6", reason="needs glibc"
)
def test_freed_memory_is_kept_for_the_next_window_and_goes_back_at_the_end() -> None:
    with keep_freed_memory(False):
        usual = page_faults()
    if usual < 100_000:
        pytest.skip("this system hands out memory in larger pages")
    with keep_freed_memory(True):
        page_faults(1)
        assert page_faults() < usual / 20
        kept = resident()
    assert resident() < kept - 40 * 2**20


def resident() -> int:
    """Bytes of the process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
