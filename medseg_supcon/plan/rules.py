"""The rules of a plan: spacing, strides, patch size, and how intensities are normalised."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from medseg_supcon.datasets import normalisation, readable

ANISOTROPIC = 3.0
MOST_PATCHES_ON_CPU = 64
SMALLEST_EDGE = 4

Floats = npt.NDArray[np.float64]


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

    Args:
        channels: names in order, of which several may be equal; `datasets.normalisation` says what each means.
        foreground: per channel "mean", "std", "percentile_00_5", "percentile_99_5" inside the structures.
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
    steps.append({"_target_": "ConcatItemsd", "keys": keys, "name": "image", "dim": 0})
    steps.append({"_target_": "DeleteItemsd", "keys": keys})
    return steps


def _normalise(key: str, kind: str, stats: Mapping[str, float]) -> list[dict[str, Any]]:
    if kind == "nonorm":
        return []
    if kind == "ct":
        return [_window(key, stats)]
    if kind == "rgb_to_0_1":
        limits = {"a_min": 0, "a_max": 255, "b_min": 0, "b_max": 1}
        return [{"_target_": "ScaleIntensityRanged", "keys": key, **limits}]
    if kind == "rescale_to_0_1":
        return [{"_target_": "ScaleIntensityd", "keys": key, "minv": 0, "maxv": 1, "channel_wise": True}]
    return [{"_target_": "NormalizeIntensityd", "keys": key, "channel_wise": True}]


def _window(key: str, stats: Mapping[str, float]) -> dict[str, Any]:
    low, high = stats["percentile_00_5"], stats["percentile_99_5"]
    if not high > low:
        low, high = low - 0.5, low + 0.5
    mean, std = stats["mean"], stats["std"] or 1.0
    return {
        "_target_": "ScaleIntensityRanged",
        "keys": key,
        "a_min": readable(low, 6),
        "a_max": readable(high, 6),
        "b_min": readable((low - mean) / std, 6),
        "b_max": readable((high - mean) / std, 6),
        "clip": True,
    }
