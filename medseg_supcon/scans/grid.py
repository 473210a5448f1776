"""A scan as read: its voxels, and the grid that its mask goes back to."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import nibabel
import numpy as np
import numpy.typing as npt

from medseg_supcon.errors import DataError

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
        >>> from medseg_supcon.scans import farthest_corner
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
        >>> from medseg_supcon.scans import shear_degrees
        >>> tilted = np.array([[1, 0, 1, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
        >>> round(shear_degrees(tilted), 6)
        45.0
    """
    axes = np.asarray(affine, dtype=np.float64)[:3, :3]
    axes = axes / np.linalg.norm(axes, axis=0)
    cosine = float(np.abs(axes.T @ axes - np.eye(3)).max())
    return math.degrees(math.asin(min(1.0, cosine)))


Affine = npt.NDArray[np.float64]
# What a NIfTI header says about where the voxels are.
PLACE = (
    *("qform_code", "quatern_b", "quatern_c", "quatern_d", "qoffset_x", "qoffset_y", "qoffset_z"),
    *("sform_code", "srow_x", "srow_y", "srow_z"),
)


@dataclass(frozen=True)
class Grid:
    """Where the voxels of a scan are.

    Attributes:
        shape: of the file, (X, Y, Z) and any trailing axes of one.
        affine: (4, 4), voxel indices to RAS+ mm.
        header: a NIfTI header that says the same; the file's own where it has one.
    """

    shape: tuple[int, ...]
    affine: Affine
    header: Any

    @property
    def spacing(self) -> npt.NDArray[np.float64]:
        """mm per axis."""
        return np.asarray(np.linalg.norm(self.affine[:3, :3], axis=0))

    @property
    def voxel_ml(self) -> float:
        return float(abs(np.linalg.det(self.affine[:3, :3]))) / 1000

    @classmethod
    def at(cls, shape: tuple[int, ...], affine: Affine) -> Grid:
        """The grid of a file that is not NIfTI: qform and sform alike, code 1 (scanner)."""
        header = nibabel.Nifti1Header()
        header.set_qform(affine, 1)
        header.set_sform(affine, 1)
        header.set_xyzt_units("mm")
        return cls(shape, affine, header)

    def place(self, header: Any) -> None:
        """Puts a mask where the scan is: its forms, codes, voxel sizes and unit of length, to the last bit."""
        for name in PLACE:
            header[name] = self.header[name]
        header["pixdim"][:4] = self.header["pixdim"][:4]
        header["xyzt_units"] = int(self.header["xyzt_units"]) & 7


@dataclass(frozen=True)
class ScanVolume:
    """A scan's voxels (C, X, Y, Z), float32, its grid, the affine that MONAI takes for it, and warnings."""

    data: npt.NDArray[np.float32]
    grid: Grid
    affine: Affine
    warnings: list[str] = field(default_factory=list)


def check_affine(affine: npt.NDArray[Any], file: object) -> Affine:
    """The affine as float64, if it places voxels in space.

    Raises:
        DataError: it is not invertible, not finite, or sheared.
    """
    affine = np.asarray(affine, dtype=np.float64)
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    if not np.isfinite(affine).all() or not (spacing > 0).all():
        raise DataError(
            f"{file}: the header gives no usable position in space (affine {_short(affine)}). Mend it."
        )
    axes = affine[:3, :3] / spacing
    if abs(np.linalg.det(axes)) < 1e-3:
        raise DataError(f"{file}: two axes of the affine {_short(affine)} are parallel. Mend the header.")
    if (degrees := shear_degrees(affine)) > MAX_SHEAR_DEGREES:
        raise DataError(
            f"{file}: the affine is sheared (two axes are {degrees:.1f} degrees off a right angle, at most "
            f"{MAX_SHEAR_DEGREES:g} are taken; a tilted gantry does this). Resample the scan onto a grid with "
            "perpendicular axes first."
        )
    return affine


def check_values(data: npt.NDArray[Any], file: object) -> npt.NDArray[np.float32]:
    """The voxels as float32, if each is a finite real number.

    Raises:
        DataError: colours, complex numbers, NaN or infinity.
    """
    if data.dtype.kind not in "biuf":
        raise DataError(
            f"{file}: voxels must be one real number each, found {data.dtype}. Convert it to a grey scan."
        )
    with np.errstate(over="ignore", invalid="ignore"):
        values = np.asarray(data, dtype=np.float32)
    if not np.isfinite(values.sum(dtype=np.float64)):
        bad = int(np.count_nonzero(~np.isfinite(values)))
        if bad:
            raise DataError(f"{file}: {bad} voxels are NaN or infinite. Replace them, for example by 0.")
    return values


def _short(affine: Affine) -> str:
    return str(np.round(affine[:3], 4).tolist())
