"""A scan as read: its voxels, and the grid that its mask goes back to."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import nibabel
import numpy as np
import numpy.typing as npt

from medseg_supcon.data import MAX_SHEAR_DEGREES, shear_degrees
from medseg_supcon.errors import DataError

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
class Volume:
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
