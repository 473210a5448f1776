"""The processes that load batches for a GPU."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Mapping
from typing import Any

import torch

MOST = 16
AHEAD = 2  # batches that a worker of torch's DataLoader has ready
SHARED = "/dev/shm"  # through which they reach the trainer


def loader_workers(device: str | torch.device, batch_size: int, plan: Mapping[str, Any]) -> int:
    """Processes that load batches: on a GPU one for each core that this process may use, at most 16; 0 on a CPU.

    No more than have room in half of the free shared memory: a worker that finds none dies, and the training with it
    (a container has 64 MB unless told otherwise).

    Args:
        device: where training runs.
        batch_size: scans per step.
        plan: its ``patch_size`` and ``channels``.

    Example:
        >>> loader_workers("cpu", 2, {"patch_size": [128, 128, 128], "channels": ["MRI"]})
        0
    """
    if torch.device(device).type == "cpu":
        return 0
    affinity = getattr(os, "sched_getaffinity", None)  # not every system has it
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    try:
        room = shutil.disk_usage(SHARED).free / 2
    except OSError:  # a system that shares memory otherwise
        room = math.inf
    return int(min(MOST, cores, room // (AHEAD * batch_bytes(batch_size, plan))))


def batch_bytes(batch_size: int, plan: Mapping[str, Any]) -> int:
    """Of two views of each scan: float32 for every channel, an int64 label and an int64 pair of every voxel."""
    return int(batch_size * 2 * math.prod(plan["patch_size"]) * (4 * len(plan["channels"]) + 8 + 8))
