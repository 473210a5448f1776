"""Memory that a training step frees and asks for again."""

from __future__ import annotations

import ctypes
import gc
import math
import os
import shutil
import sys
from collections.abc import Mapping
from typing import Any

import torch
from ignite.engine import Engine, Events
from torch import nn

from medseg_supcon.errors import ConfigError

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


def amp_dtype(name: str) -> torch.dtype:
    """The type of mixed precision that ``amp_dtype`` of train.yaml names.

    Raises:
        ConfigError: neither bfloat16 nor float16.

    >>> amp_dtype("bfloat16")
    torch.bfloat16
    """
    if name not in DTYPES:
        raise ConfigError(f"amp_dtype must be bfloat16 or float16, got {name!r}.")
    return DTYPES[name]


def usual_amp_dtype(device: str | torch.device) -> str:
    """``"bfloat16"``, which needs no scaled loss; ``"float16"`` on GPUs before Ampere, which have no fast bfloat16.

    >>> usual_amp_dtype("cpu")
    'bfloat16'
    """
    if torch.device(device).type != "cuda" or not torch.cuda.is_available():
        return "bfloat16"
    return "bfloat16" if torch.cuda.get_device_capability(device)[0] >= 8 else "float16"


def memory_format(channels_last: bool) -> torch.memory_format:
    """Where a volume's channels lie in memory: beside each other, or as they are."""
    return torch.channels_last_3d if channels_last else torch.preserve_format


def tune_gpu(device: str | torch.device, *, tf32: bool = True, benchmark: bool = True) -> None:
    """Let GPUs take their fastest kernels; changes nothing on a CPU, whose trainings stay reproducible.

    Args:
        device: where training runs.
        tf32: float32 products in TensorFloat-32 (10 bits of mantissa), for what mixed precision leaves in float32.
        benchmark: cuDNN tries its algorithms once for every shape, and may take one that adds in no fixed order.
    """
    if torch.device(device).type != "cuda":
        return
    torch.backends.cuda.matmul.allow_tf32 = tf32
    torch.backends.cudnn.allow_tf32 = tf32
    torch.backends.cudnn.deterministic = not benchmark
    torch.backends.cudnn.benchmark = benchmark


def compiled(network: nn.Module, backend: str | None) -> nn.Module:
    """The network itself, run by ``torch.compile`` from now on; names of its weights stay.

    Args:
        network: a ``ContrastiveNetwork``.
        backend: of ``torch.compile``: ``"inductor"`` (needs a C++ compiler, and Triton on a GPU); ``None``: as it is.

    Raises:
        ConfigError: torch knows no such backend.
    """
    if backend is None:
        return network
    known = torch.compiler.list_backends(exclude_tags=())
    if backend not in known:
        raise ConfigError(f"compile must be null or one of {', '.join(known)}, got {backend!r}.")
    network.compile(backend=backend)
    return network


class LossScale:
    """Scales the loss where float16 would lose small gradients; bfloat16 needs no scale and gets none.

    MONAI's trainer begins every run with a fresh scaler; this handler replaces it, so it must stand before
    ``Checkpoint``, which saves and restores its state.

    Args:
        dtype: of mixed precision.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.STARTED, self)

    def __call__(self, engine: Any) -> None:
        if engine.amp:
            device = torch.device(engine.state.device).type
            # a scaler that is not enabled passes everything through, and spares the wait for "all finite?"
            engine.scaler = torch.amp.GradScaler(device, enabled=self.dtype == torch.float16)


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


M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # malloc.h of glibc


def keep_freed_memory() -> bool:
    """Let glibc keep what a step frees for the next one, instead of giving every large tensor back to the system.

    The pages would be mapped and cleared again at every step: a fifth of the time of a small network's step on a
    CPU. Changes this process only; does nothing where the C library is not glibc.

    Returns:
        whether it took effect.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        libc = ctypes.CDLL("libc.so.6")
        return bool(libc.mallopt(M_MMAP_MAX, 0)) and bool(libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1))
    except (OSError, AttributeError):
        return False


def free_memory() -> None:
    """Give a GPU's memory back that nothing holds any more: what comes next wants it, or another process."""
    gc.collect()  # trainer and handlers refer to each other
    torch.cuda.empty_cache()  # does nothing where no GPU was used
