"""Where voxels lie: how far two grids are apart, and how far axes are off a right angle."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

__all__ = ["MAX_SHEAR_DEGREES", "farthest_corner", "shear_degrees"]

MAX_SHEAR_DEGREES = 0.6  # check, train and predict refuse more: over 200 mm it is 2 mm

Floats = npt.NDArray[np.float64]


def farthest_corner(shape: Sequence[int], one: Floats, other: Floats) -> float:
    """Largest distance between equal corners of a grid under two affines, so that a small turn counts in full.

    Args:
        shape: (X, Y, Z) voxels; further axes are left out.
        one: (4, 4) affine, voxel indices to world.
        other: (4, 4) affine in the same unit of length.

    Returns:
        The distance between the outer corners of the outermost voxels, in the affines' unit.

    Example:
        >>> import numpy as np
        >>> from medseg_supcon.data import farthest_corner
        >>> farthest_corner((10, 1, 1), np.eye(4), np.diag([1.5, 1, 1, 1]))  # from 9.5 mm to 14.25 mm
        4.75
    """
    corners = np.array(list(itertools.product(*((-0.5, n - 0.5) for n in shape[:3]))))
    change = np.asarray(one, dtype=np.float64) - np.asarray(other, dtype=np.float64)
    return float(np.linalg.norm(corners @ change[:3, :3].T + change[:3, 3], axis=1).max())


def shear_degrees(affine: Floats) -> float:
    """How far the two axes that are least perpendicular are off a right angle, in degrees (0 to 90).

    Args:
        affine: (4, 4), voxel indices to world; no axis of length zero.

    Example:
        >>> import numpy as np
        >>> from medseg_supcon.data import shear_degrees
        >>> tilted = np.array([[1, 0, 1, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
        >>> round(shear_degrees(tilted), 6)
        45.0
    """
    axes = np.asarray(affine, dtype=np.float64)[:3, :3]
    axes = axes / np.linalg.norm(axes, axis=0)
    cosine = float(np.abs(axes.T @ axes - np.eye(3)).max())
    return math.degrees(math.asin(min(1.0, cosine)))
