"""From fingerprint to plan: every value of `plan.json`, by rules that a person can follow."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from medseg_supcon.datasets import Dataset, Fingerprint, readable
from medseg_supcon.errors import DataError
from medseg_supcon.losses import balanced_class_weights
from medseg_supcon.networks import chain
from medseg_supcon.plan.rules import coarsened, intensity_transforms, patch_size, strides, target_spacing

CPU_PATCH_VOXELS = 90_000
GPU_PATCH_VOXELS = 128**3
GPU_GIB_PER_LARGEST_SCAN = 8.0  # two views of one scan at 128^3, mixed precision
SIDED = re.compile(  # kidney_left, Left Kidney, leftKidney, KidneyLeft, LKidney; not bright, cleft, LV
    r"(?<![a-z])(left|right)|(?<![a-z])(lh|rh|l|r|lt|rt|sin|dext?)(?![a-z])"
    r"|(?<=[a-z])(Left|Right|LH|RH)\b|(?<![A-Za-z])[LR](?=[A-Z][a-z])"
)


def network_definition(
    in_channels: int, classes: int, steps: Sequence[tuple[int, int, int]], *, width: int = 16, most: int = 320
) -> dict[str, Any]:
    """The default network as a plan's ``network_def``: a residual MONAI UNet and a last 1x1x1 convolution.

    Args:
        in_channels: channels of a scan.
        classes: output channels, background included.
        steps: stride per level and axis.
        width: channels at full resolution's first level, doubled per level up to `most`.
    """
    unet = {
        "_target_": "monai.networks.nets.UNet",
        "spatial_dims": 3,
        "in_channels": in_channels,
        "out_channels": width,
        "channels": [min(width * 2**level, most) for level in range(len(steps) + 1)],
        "strides": [step[0] if len(set(step)) == 1 else list(step) for step in steps],
        "num_res_units": 2,
    }
    last = {"_target_": "torch.nn.Conv3d", "in_channels": width, "out_channels": classes, "kernel_size": 1}
    return chain(unet, last)


def make_plan(
    fingerprint: Fingerprint,
    dataset: Dataset,
    *,
    device: str = "cpu",
    cores: int | None = None,
    memory_gib: float | None = None,
) -> dict[str, Any]:
    """The content of `plan.json` (keys and meaning: docs/architecture.md).

    Rules: orientation RAS. Spacing: the median; along the coarse axis of anisotropic data (ratio above 3) the
        10th percentile. On a CPU a scan of median size is to hold at most 64 patches, or the finest axes are
        coarsened.
    Patch: grown axis by axis, isotropic in mm, up to the median scan within 90,000 voxels (CPU) or up to
        128^3 (GPU, by memory), in steps of what the network divides by. Network: a residual UNet of three
        strides, more for larger patches, no stride along an axis that is still twice as coarse as the finest.
        CT is clipped and scaled by the structures' intensities, any other channel normalised per scan. The
        left-right axis may be mirrored unless a class name tells sides apart; no other axis may. `epochs` and
        `expected` are first estimates.

    Args:
        fingerprint: of the cases that train.
        dataset: names, channels and labels.
        device: "cpu", or a GPU such as "cuda" or "cuda:1".
        cores: CPU cores to train on; None for those of this machine.
        memory_gib: memory of the GPU; None for what is found.

    Raises:
        DataError: no case of the fingerprint has a labelled structure.

    Example:
        >>> import tempfile
        >>> from medseg_supcon.datasets import fingerprint, make_phantoms, read_dataset
        >>> from medseg_supcon.plan import make_plan
        >>> dataset = read_dataset(make_phantoms(tempfile.mkdtemp() + "/phantoms", cases=2, unseen=0))
        >>> make_plan(fingerprint(dataset), dataset)["orientation"]
        'RAS'
    """
    on_gpu = not device.startswith("cpu")
    cores = cores or os.cpu_count() or 1
    memory = memory_gib if memory_gib is not None else _memory_gib(device)
    room = min(1.0, memory / (2 * GPU_GIB_PER_LARGEST_SCAN))
    budget = int(GPU_PATCH_VOXELS * room) if on_gpu else CPU_PATCH_VOXELS
    counts = fingerprint.class_voxels
    if counts[1:].sum() == 0:
        raise DataError(f"{dataset.root}: the label maps of the training cases hold no structure. Add labelled cases.")

    spacing = target_spacing(fingerprint.spacings)
    extents = fingerprint.shapes * fingerprint.spacings
    if not on_gpu:
        spacing = coarsened(spacing, np.median(extents, axis=0), budget)
    spacing = np.array([readable(mm) for mm in spacing])
    shape = np.median(np.round(extents / spacing), axis=0)
    side = float(np.prod(np.minimum(shape, budget ** (1 / 3))) ** (1 / 3))
    steps = strides(spacing, shape, levels=3 if side < 64 else 4 if side < 112 else 5)
    divisor = np.prod(steps, axis=0)
    patch = patch_size(spacing, shape, budget, divisor)
    voxels = int(np.prod(patch))
    batch = int(np.clip(memory / GPU_GIB_PER_LARGEST_SCAN * GPU_PATCH_VOXELS / voxels, 2, 8)) if on_gpu else 2
    steps_per_epoch = 250 if on_gpu else 50
    # Seconds of a step: 0.9 microseconds a voxel on two cores (measured); for the GPU a guess.
    seconds = 0.05 + 2 * batch * voxels * (6e-8 if on_gpu else 1.8e-6 / min(cores, 8))
    minutes = 120 if on_gpu else 25
    foreground = [fingerprint.foreground(c) for c in range(len(dataset.channels))]
    return {
        "name": dataset.name,
        "channels": list(dataset.channels),
        "labels": dict(dataset.labels),
        "ignore_label": dataset.ignore_label,
        "orientation": "RAS",
        "spacing": [float(mm) for mm in spacing],
        "intensity": intensity_transforms(dataset.channels, foreground),
        "patch_size": patch,
        "flip_axes": [] if _tells_sides(dataset.labels) else [0],
        "batch_size": batch,
        "steps_per_epoch": steps_per_epoch,
        "epochs": max(1, round(minutes * 60 / (seconds * steps_per_epoch))),
        "class_frequencies": [readable(n / counts.sum()) for n in counts],
        "class_weights": [readable(w) for w in balanced_class_weights(counts.tolist()).tolist()],
        "network_def": network_definition(
            len(dataset.channels), len(dataset.labels), steps, width=32 if on_gpu else 16
        ),
        "inference": {"overlap": 0.5, "sw_batch_size": 4},
        "keep_largest": [],
        "expected": {
            "minutes": minutes,
            "memory_gib": readable(1.5 + 2 * batch * voxels * 4e-6, 2),
            "machine": f"{device} (an estimate, nothing measured yet)" if on_gpu else f"{cores} CPU cores (estimate)",
        },
        "fingerprint": fingerprint.summary(),
    }


def _tells_sides(names: Sequence[str] | dict[str, Any]) -> bool:
    """Whether a class name says left or right, so that a mirrored scan would be labelled wrongly."""
    return any(SIDED.search(name.replace("_", " ").lower()) or SIDED.search(name) for name in names)


def _memory_gib(device: str) -> float:
    if device.startswith("cuda"):
        import torch

        if torch.cuda.is_available():
            return float(torch.cuda.get_device_properties(torch.device(device)).total_memory) / 2**30
    return 2 * GPU_GIB_PER_LARGEST_SCAN
