"""The geometric half of a plan: target spacing, strides of the network, patch size."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

__all__ = ["coarsened", "patch_size", "strides", "target_spacing"]

ANISOTROPIC = 3.0
MOST_PATCHES_ON_CPU = 64
SMALLEST_EDGE = 4

Floats = npt.NDArray[np.float64]


def target_spacing(spacings: Floats) -> Floats:
    """The median spacing (3,) of (n, 3); for anisotropic data the coarse axis takes its 10th percentile.

    nnU-Net's rule (Isensee et al., Nature Methods 2021): interpolating a little along a coarse axis costs
    less than throwing away the slices of the better scans. Data count as anisotropic above a ratio of 3.
    """
    target = np.median(spacings, axis=0)
    coarse = int(np.argmax(target))
    if target[coarse] > ANISOTROPIC * target.min():
        target[coarse] = max(np.percentile(spacings[:, coarse], 10), np.delete(target, coarse).max())
    return target.astype(np.float64)


def coarsened(spacing: Floats, extent: Floats, budget: int, most: int = MOST_PATCHES_ON_CPU) -> Floats:
    """Spacing at which a scan of `extent` mm holds at most `most` patches of `budget` voxels.

    The finest axes are coarsened first, so that anisotropic data become more isotropic on the way. A patch of
    a very large scan would otherwise see too little of it, and a CPU could not get through it.
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
    """Voxels per axis: as isotropic in mm as can be, within `budget` voxels, no larger than the scan demands.

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
