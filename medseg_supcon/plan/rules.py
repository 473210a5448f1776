"""From fingerprint to plan: every value of `plan.json`, by rules that a person can follow."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from medseg_supcon.datasets import Dataset, Fingerprint, normalisation, readable
from medseg_supcon.errors import DataError
from medseg_supcon.losses import balanced_class_weights
from medseg_supcon.networks import chain
from medseg_supcon.plan.segments import segment_codes

CPU_PATCH_VOXELS = 90_000
GPU_PATCH_VOXELS = 128**3
GPU_GIB_PER_LARGEST_SCAN = 8.0  # two views of one scan at 128^3, mixed precision
SIDED = re.compile(  # kidney_left, Left Kidney, leftKidney, KidneyLeft, LKidney; not bright, cleft, LV
    r"(?<![a-z])(left|right)|(?<![a-z])(lh|rh|l|r|lt|rt|sin|dext?)(?![a-z])"
    r"|(?<=[a-z])(Left|Right|LH|RH)\b|(?<![A-Za-z])[LR](?=[A-Z][a-z])"
)

ANISOTROPIC = 3.0
MOST_PATCHES_ON_CPU = 64
SMALLEST_EDGE = 4

Floats = npt.NDArray[np.float64]


def network_definition(
    in_channels: int, classes: int, steps: Sequence[tuple[int, int, int]], width: int, most: int = 320
) -> dict[str, Any]:
    """A plan's ``network_def``: a residual MONAI UNet of `width` channels, doubled per level, and a 1x1x1 convolution."""
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

    Orientation RAS. Spacing: the median; along the coarse axis of anisotropic data (ratio above 3) the 10th percentile.
    On a CPU the finest axes are coarsened until a scan of median size holds at most 64 patches. Patch: grown axis by
    axis, isotropic in mm, up to the median scan within 90,000 voxels (CPU) or 128^3 (GPU, by memory), in steps of what
    the network divides by. Network: a residual UNet of three strides, more for larger patches, no stride along an axis
    that is still twice as coarse as the finest. The left-right axis may be mirrored unless a class name says left or
    right; no other axis may. `epochs` and `expected` are first estimates.

    Args:
        fingerprint: of the cases that train (`DataError` if none has a labelled structure).
        dataset: names, channels and labels.
        device: "cpu", or a GPU such as "cuda" or "cuda:1".
        cores, memory_gib: CPU cores, and the GPU's memory; None for those of this machine.

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
        "segments": segment_codes(list(dataset.labels)[1:]),
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
        "network_def": network_definition(len(dataset.channels), len(dataset.labels), steps, 32 if on_gpu else 16),
        "inference": {"overlap": 0.5, "sw_batch_size": 4},
        "keep_largest": [],
        "expected": {
            "minutes": minutes,
            "memory_gib": readable(1.5 + 2 * batch * voxels * 4e-6, 2),
            "machine": f"{device if on_gpu else f'{cores} CPU cores'} (estimate)",
        },
        "fingerprint": fingerprint.summary(),
    }


def _tells_sides(names: Sequence[str] | dict[str, Any]) -> bool:
    """Whether a class name says left or right, so that a mirrored scan would be labelled wrongly."""
    return any(SIDED.search(name.replace("_", " ").lower()) or SIDED.search(name) for name in names)


def _memory_gib(device: str) -> float:
    if device.startswith("cuda") and torch.cuda.is_available():
        return float(torch.cuda.get_device_properties(torch.device(device)).total_memory) / 2**30
    return 2 * GPU_GIB_PER_LARGEST_SCAN


def target_spacing(spacings: Floats) -> Floats:
    """The median spacing (3,) of (n, 3); for anisotropic data the coarse axis takes its 10th percentile.

    nnU-Net's rule (Isensee et al., Nature Methods 2021): interpolating a little along a coarse axis costs
    less than dropping slices of the better scans. Data count as anisotropic above a ratio of 3.
    """
    target = np.median(spacings, axis=0)
    coarse = int(np.argmax(target))
    if target[coarse] > ANISOTROPIC * target.min():
        target[coarse] = max(np.percentile(spacings[:, coarse], 10), np.delete(target, coarse).max())
    return target.astype(np.float64)


def coarsened(spacing: Floats, extent: Floats, budget: int, most: int = MOST_PATCHES_ON_CPU) -> Floats:
    """Spacing at which a scan of `extent` mm holds at most `most` patches of `budget` voxels.

    The finest axes are coarsened first, so that anisotropic data become more isotropic on the way. Otherwise a patch
    would see too little of a very large scan, and a CPU would take too long.
    """

    def patches(floor: float) -> float:
        return float(np.prod(extent / np.maximum(spacing, floor)) / budget)

    low, high = float(spacing.min()), float(max(extent.max(), spacing.max()))
    if patches(low) <= most:
        return spacing
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if patches(middle) > most else (low, middle)
    return np.maximum(spacing, high)


def strides(spacing: Floats, shape: Floats, levels: int) -> list[tuple[int, int, int]]:
    """Stride per level and axis of the encoder.

    An axis is halved unless it is still more than twice as coarse as the finest one, or would fall below four
    voxels in a scan of the median `shape`. At least one level is given.
    """
    spacing, shape = spacing.copy(), shape.copy()
    steps: list[tuple[int, int, int]] = []
    for _ in range(levels):
        halve = (spacing <= 2 * spacing.min() + 1e-6) & (shape / 2 >= SMALLEST_EDGE)
        step = np.where(halve, 2, 1)
        if steps and not halve.any():
            break
        steps.append((int(step[0]), int(step[1]), int(step[2])))
        spacing, shape = spacing * step, shape / step
    return steps


def patch_size(spacing: Floats, shape: Floats, budget: int, divisor: Sequence[int]) -> list[int]:
    """Voxels per axis: as isotropic in mm as can be, within `budget` voxels, no larger than the scan needs.

    Starts from the smallest patch that the network takes and lengthens the axis that is shortest in mm, one
    divisor at a time, until each axis covers the median `shape` or the budget is spent.
    """
    step = np.asarray(divisor, dtype=np.int64)
    size = step.copy()
    open_axes = size < np.ceil(shape)
    while open_axes.any():
        axis = int(np.argmin(np.where(open_axes, size * spacing, np.inf)))
        longer = size.copy()
        longer[axis] += step[axis]
        if np.prod(longer) > budget:
            open_axes[axis] = False
            continue
        size = longer
        open_axes[axis] = bool(size[axis] < np.ceil(shape[axis]))
    return [int(n) for n in size]


def intensity_transforms(channels: Sequence[str], foreground: Sequence[Mapping[str, float]]) -> list[dict[str, Any]]:
    """Transform configs for key ``image`` that normalise a scan, usually to about zero mean and unit variance.

    CT is in absolute units: clipped to the 0.5 and 99.5 percentiles of the structures' intensities, then shifted and
    scaled by their mean and standard deviation (nnU-Net's rule). Channels called "noNorm", "rescale_to_0_1" or
    "rgb_to_0_1" are treated as nnU-Net does. Any other channel has no common scale and is normalised per scan.
    Channels of several kinds are split, treated each in its way, and stacked again.
    `foreground`: per channel "mean", "std", "percentile_00_5" and "percentile_99_5" inside the structures.
    """
    kinds = [normalisation(name) for name in channels]
    if len(set(kinds)) == 1 and (kinds[0] != "ct" or len(kinds) == 1):
        return _normalise("image", kinds[0], foreground[0])
    postfixes = [str(index) for index in range(len(channels))]
    keys = [f"image_{postfix}" for postfix in postfixes]
    steps: list[dict[str, Any]] = [
        {"_target_": "SplitDimd", "keys": "image", "output_postfixes": postfixes, "dim": 0, "keepdim": True}
    ]
    for key, kind, stats in zip(keys, kinds, foreground, strict=True):
        steps += _normalise(key, kind, stats)
    joined = {"_target_": "ConcatItemsd", "keys": keys, "name": "image", "dim": 0}
    return [*steps, joined, {"_target_": "DeleteItemsd", "keys": keys}]


def _normalise(key: str, kind: str, stats: Mapping[str, float]) -> list[dict[str, Any]]:
    limits = {"a_min": 0, "a_max": 255, "b_min": 0, "b_max": 1}
    steps = {
        "nonorm": [],
        "ct": [_window(key, stats)],
        "rgb_to_0_1": [{"_target_": "ScaleIntensityRanged", "keys": key, **limits}],
        "rescale_to_0_1": [{"_target_": "ScaleIntensityd", "keys": key, "minv": 0, "maxv": 1, "channel_wise": True}],
        "zscore": [{"_target_": "NormalizeIntensityd", "keys": key, "channel_wise": True}],
    }
    return steps[kind]


def _window(key: str, stats: Mapping[str, float]) -> dict[str, Any]:
    low, high = stats["percentile_00_5"], stats["percentile_99_5"]
    if not high > low:
        low, high = low - 0.5, low + 0.5
    mean, std = stats["mean"], stats["std"] or 1.0
    limits = {"a_min": low, "a_max": high, "b_min": (low - mean) / std, "b_max": (high - mean) / std}
    rounded = {name: readable(value, 6) for name, value in limits.items()}
    return {"_target_": "ScaleIntensityRanged", "keys": key, **rounded, "clip": True}
