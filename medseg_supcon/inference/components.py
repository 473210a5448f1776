"""Post-processing of masks: which connected components (26 neighbours) of a class stay."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from medseg_supcon.datasets import Regions

NEIGHBOURS = np.ones((3, 3, 3))
ROUNDING = 1e-6  # relative: a component of exactly the smallest volume stays


def postprocess(classes: npt.NDArray[Any], plan: Mapping[str, Any], voxel_mm3: float) -> None:
    """Apply a plan's ``keep_largest``, then its ``smallest_mm3``, to class indices (X, Y, Z), in place.

    With regions, both name these, and what leaves a region gets the class of `Regions.without`.
    """
    regions = Regions.of(plan)
    order = list(plan["labels"] if regions is None else regions.names)
    keep_largest(classes, [order.index(name) for name in order if name in plan["keep_largest"]], regions)
    smallest = plan.get("smallest_mm3", {})
    remove_small(classes, {order.index(name): volume for name, volume in smallest.items()}, voxel_mm3, regions)


def keep_largest(classes: npt.NDArray[Any], which: Sequence[int], regions: Regions | None = None) -> None:
    """Turn all but the largest component of some classes into background, in place."""
    for index in which:
        for part, components, voxels in _components(classes, index, regions):
            if len(voxels) > 2:
                lost = (components > 0) & (components != voxels[1:].argmax() + 1)
                part[lost] = _left(part[lost], index, regions)


def remove_small(
    classes: npt.NDArray[Any], smallest_mm3: Mapping[int, float], voxel_mm3: float, regions: Regions | None = None
) -> None:
    """Turn the components of some classes that are smaller than a volume into background, in place.

    >>> classes = np.zeros((5, 5, 5), int); classes[:2, :2, :2] = classes[4, 4, 4] = 1
    >>> remove_small(classes, {1: 4.0}, voxel_mm3=0.5)
    >>> int(classes.sum())
    8
    """
    for index, smallest in smallest_mm3.items():
        for part, components, voxels in _components(classes, index, regions):
            small = voxels * voxel_mm3 < smallest * (1 - ROUNDING)
            small[0] = False
            lost = small[components]
            part[lost] = _left(part[lost], index, regions)


def _components(
    classes: npt.NDArray[Any], index: int, regions: Regions | None
) -> Iterator[tuple[npt.NDArray[Any], npt.NDArray[Any], npt.NDArray[Any]]]:
    """The box around a class or region, its components numbered in it, and the voxels of each, of the rest first."""
    inside = classes == index if regions is None else regions.membership[index][classes]
    for box in ndimage.find_objects(inside.astype(np.uint8)):
        components, count = ndimage.label(inside[box], structure=NEIGHBOURS)
        yield classes[box], components, np.bincount(components.ravel(), minlength=count + 1)


def _left(classes: npt.NDArray[Any], index: int, regions: Regions | None) -> Any:
    return 0 if regions is None else regions.without(index)[classes]
