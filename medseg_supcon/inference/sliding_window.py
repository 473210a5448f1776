"""Sliding-window inference over a whole scan in bounded memory, and again with less if memory runs out."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import combinations
from typing import Any, TypeVar

import torch
from monai.data.utils import compute_importance_map, dense_patch_slices
from torch import Tensor
from torch.nn import functional as F

from medseg_supcon.bundle import Model
from medseg_supcon.datasets import output_channels
from medseg_supcon.errors import RunError

CPU_VOXELS = 2**20  # per batch: more is not faster on a CPU and needs more memory
ALLOCATORS = ("DefaultCPUAllocator", "bad_alloc")
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
KEPT = 2**30  # bytes; one allocation above this still comes from the system
USUAL = 2**25  # where glibc's own, growing threshold ends on a 64-bit system
Result = TypeVar("Result")


def network_outputs(model: Model, device: torch.device, tta: bool, amp: bool) -> Callable[[Tensor], Tensor]:
    """Logits of a batch (B, C, *patch) -> (B, K, *patch); with ``tta`` the mean probabilities over all mirrorings."""
    network, channels = model.network.to(device), output_channels(model.plan)
    activate = activation(model.plan)
    axes = [axis + 2 for axis in model.plan["flip_axes"]]
    mirrorings = [flips for n in range(len(axes) + 1) for flips in combinations(axes, n)]

    def logits(batch: Tensor) -> Tensor:
        with torch.autocast(device.type, enabled=amp):
            output = network(batch)
        output = output[0] if isinstance(output, tuple | list) else output
        if output.shape[1] != channels:
            found = f"the network outputs {output.shape[1]} channels, but the plan has {channels} labels"
            raise RunError(f"{model.name}: {found}. Correct network_def or labels in plan.json.")
        return torch.as_tensor(output)

    def mirrored(batch: Tensor) -> Tensor:
        total = torch.zeros(())
        for flips in mirrorings:
            probabilities = activate(logits(batch.flip(flips)).float(), dim=1).flip(flips)
            total = probabilities if not flips else total + probabilities
        return total / len(mirrorings)

    return mirrored if tta else logits


def activation(plan: Mapping[str, Any]) -> Callable[..., Tensor]:
    """From a network's logits to probabilities, along ``dim``: softmax, or the sigmoid of regions that may overlap."""

    def sigmoid(logits: Tensor, dim: int) -> Tensor:
        return logits.sigmoid()

    return sigmoid if plan.get("regions") else torch.softmax


def batch_on(device: torch.device, batch_size: int, patch_size: Sequence[int]) -> int:
    """Windows per call: fewer on a CPU if they are large, but at least two (torch is slower with one)."""
    most = max(2, CPU_VOXELS // math.prod(patch_size)) if device.type == "cpu" else batch_size
    return min(batch_size, most)


def windows(
    image: Tensor,
    predict: Callable[[Tensor], Tensor],
    patch_size: Sequence[int],
    overlap: float,
    batch_size: int,
    device: torch.device,
    buffer_device: torch.device,
) -> Iterator[Tensor]:
    """MONAI's `sliding_window_inference` with Gaussian weights, addition for addition, as rows that are finished.

    Takes an image (C, X, Y, Z) and ``predict``, (B, C, *patch_size) -> (B, K, *patch_size), which works on ``device``.
    Yields (K, rows, Y, Z) float32 on ``buffer_device``, where windows are stitched; all rows add up to X. A chunk is
    a view of the buffer, valid until the next one is requested: only one patch's depth is in memory at a time.
    """
    shape, patch = tuple(image.shape[1:]), tuple(patch_size)
    pad = [max(p - n, 0) for p, n in zip(patch, shape, strict=True)]
    inside = [slice(p // 2, p // 2 + n) for p, n in zip(pad, shape, strict=True)]
    image = F.pad(image, [side for p in reversed(pad) for side in (p // 2, p - p // 2)]) if any(pad) else image
    padded = tuple(image.shape[1:])
    steps = [p if p == n else max(int(p * (1 - overlap)), 1) for p, n in zip(patch, padded, strict=True)]
    places = dense_patch_slices(padded, patch, steps)
    weight = compute_importance_map(patch, mode="gaussian", sigma_scale=0.125, device=device).float()
    weight_here = weight.to(buffer_device)
    count = torch.zeros((1, patch[0], *padded[1:]), device=buffer_device)
    first, total = 0, torch.empty(0)  # rows from `first` on are unfinished

    def finished(end: int) -> Tensor:
        """The rows of the scan itself in [first, end), blended."""
        rows = slice(max(inside[0].start - first, 0), max(min(inside[0].stop, end) - first, 0))
        return total[:, rows, inside[1], inside[2]].div_(count[:, rows, inside[1], inside[2]])

    for start in range(0, len(places), batch_size):
        batch = places[start : start + batch_size]
        patches = torch.stack([image[(slice(None), *place)] for place in batch]).to(device)
        outputs = predict(patches).float() * weight
        if start == 0:
            total = torch.zeros((outputs.shape[1], patch[0], *padded[1:]), device=buffer_device)
        for place, output in zip(batch, outputs.to(buffer_device), strict=True):
            if (x := place[0].start) > first:
                yield finished(x)
                for buffer in (*total, *count):  # class by class, so that no copy of all is needed
                    buffer[: first - x] = buffer[x - first :].clone()
                    buffer[first - x :] = 0
                first = x
            total[:, :, place[1], place[2]] += output
            count[0, :, place[1], place[2]] += weight_here
    yield finished(first + patch[0])


def with_less_memory(
    work: Callable[[torch.device, torch.device, int], Result], device: torch.device, batch: int, warnings: list[str]
) -> Result:
    """``work(device, device that stitches, batch size)``, again with less if memory runs out: at last all on the CPU."""
    cpu = torch.device("cpu")
    plans = (device, device, batch), (device, cpu, batch), (device, cpu, 1), (cpu, cpu, 1)
    *attempts, last = dict.fromkeys(plans)
    for attempt in attempts:
        try:
            with keep_freed_memory(device.type == "cpu"):
                return work(*attempt)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
        if device.type == "cuda":
            torch.cuda.empty_cache()
        warnings.append(f"out of memory on {device}: trying again with less memory")
    with keep_freed_memory(True):
        return work(*last)


def is_out_of_memory(error: BaseException) -> bool:
    """Out of memory on a GPU, in torch's CPU allocator, in numpy, or wrapped in another error."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    if isinstance(error, RuntimeError) and any(words in str(error) for words in ALLOCATORS):
        return True
    cause = error.__cause__
    return cause is not None and cause is not error and is_out_of_memory(cause)


@contextmanager
def keep_freed_memory(wanted: bool) -> Iterator[None]:
    """Inside, if ``wanted``, large blocks that are freed stay in the process; at the end they are given back."""
    if wanted:
        tune_malloc(keep=True)
    try:
        yield
    finally:
        if wanted:
            tune_malloc(keep=False)


def tune_malloc(*, keep: bool) -> None:
    """Let glibc keep large blocks that are freed, or give them all back to the system; does nothing without glibc.

    Mapping and clearing their pages at every use takes a fifth of a small network's training step on a CPU.
    """
    try:
        libc = ctypes.CDLL("libc.so.6")
        set_option, trim = libc.mallopt, libc.malloc_trim
    except (OSError, AttributeError):  # another C library
        return
    set_option(M_MMAP_THRESHOLD, KEPT if keep else USUAL)
    set_option(M_TRIM_THRESHOLD, KEPT if keep else 2 * USUAL)
    if not keep:
        trim(0)
