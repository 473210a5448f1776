"""Post-processing of masks: which connected components (26 neighbours) of a class stay."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import ndimage

NEIGHBOURS = np.ones((3, 3, 3))
ROUNDING = 1e-6  # relative: a component of exactly the smallest volume stays


def postprocess(classes: npt.NDArray[Any], plan: Mapping[str, Any], voxel_mm3: float) -> None:
    """Apply a plan's ``keep_largest``, then its ``smallest_mm3``, to class indices (X, Y, Z), in place."""
    order = list(plan["labels"])
    keep_largest(classes, [order.index(name) for name in order if name in plan["keep_largest"]])
    smallest = plan.get("smallest_mm3", {})
    remove_small(classes, {order.index(name): volume for name, volume in smallest.items()}, voxel_mm3)


def keep_largest(classes: npt.NDArray[Any], which: Sequence[int]) -> None:
    """Turn all but the largest component of some classes into background, in place."""
    for index in which:
        for box in ndimage.find_objects((classes == index).astype(np.uint8)):
            part = classes[box]
            components, count = ndimage.label(part == index, structure=NEIGHBOURS)
            if count > 1:
                largest = np.bincount(components[components > 0]).argmax()
                part[(components > 0) & (components != largest)] = 0


def remove_small(classes: npt.NDArray[Any], smallest_mm3: Mapping[int, float], voxel_mm3: float) -> None:
    """Turn the components of some classes that are smaller than a volume into background, in place.

    >>> classes = np.zeros((5, 5, 5), int); classes[:2, :2, :2] = classes[4, 4, 4] = 1
    >>> remove_small(classes, {1: 4.0}, voxel_mm3=0.5)
    >>> int(classes.sum())
    8
    """
    for index, smallest in smallest_mm3.items():
        for box in ndimage.find_objects((classes == index).astype(np.uint8)):
            part = classes[box]
            components, count = ndimage.label(part == index, structure=NEIGHBOURS)
            volumes = np.bincount(components.ravel(), minlength=count + 1) * voxel_mm3
            small = volumes < smallest * (1 - ROUNDING)
            small[0] = False
            part[small[components]] = 0
