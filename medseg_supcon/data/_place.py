"""Where voxels lie: lengths in mm, how far two grids are apart, and how far axes are off a right angle."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = [
    "MAX_SHEAR_DEGREES",
    "NEAR",
    "farthest_corner",
    "in_mm",
    "one_place",
    "shear_degrees",
    "unit_of_length",
]

UNITS = {1: "metres", 3: "microns"}  # NIfTI's codes; whatever else a header says is taken for mm
MM = {"mm": 1.0, "metres": 1000.0, "microns": 0.001}
NEAR = 0.1  # of the smallest voxel edge: how far apart two grids, or two slices, may lie that count as one
MAX_SHEAR_DEGREES = 0.6  # check, train and predict refuse more: over 200 mm it is 2 mm

Floats = npt.NDArray[np.float64]


def unit_of_length(header: Any) -> str:
    """What a NIfTI header gives lengths in: "mm", "metres" or "microns"; "mm" for other formats."""
    return UNITS.get(int(header["xyzt_units"]) & 7, "mm") if "xyzt_units" in header else "mm"


def in_mm(affine: Floats, unit: str) -> Floats:
    """(4, 4) voxel indices to world, brought from a `unit_of_length` to mm."""
    scales = np.array([[MM[unit]]] * 3 + [[1.0]])  # no matrix product: Inf x 0 would warn
    return np.asarray(affine * scales)


def one_place(shape: Sequence[int], affine: Floats, other: Floats) -> bool:
    """Whether two affines put each voxel of a shape (X, Y, Z, ...) at one place; False for what is no number."""
    edge = np.linalg.norm(np.asarray(affine)[:3, :3], axis=0).min()
    return bool(farthest_corner(shape, affine, other) <= NEAR * edge)


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
