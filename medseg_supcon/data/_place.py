"""Where voxels lie: how far two grids are apart."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

__all__ = ["farthest_corner"]

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
