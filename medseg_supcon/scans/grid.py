"""Where the voxels of a scan are: its grid, how far two grids are apart, and the rules that every grid must keep."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import nibabel
import numpy as np
import numpy.typing as npt

NEAR = 0.1  # of the smallest voxel edge: two grids, or two slices, that are closer than this count as one
MAX_SHEAR_DEGREES = 0.6  # check, train and predict refuse more: over 200 mm it is 2 mm
FORMS = (  # of a NIfTI header
    *("qform_code", "quatern_b", "quatern_c", "quatern_d", "qoffset_x", "qoffset_y", "qoffset_z"),
    *("sform_code", "srow_x", "srow_y", "srow_z"),
)

Numbers = npt.NDArray[np.float64]
Affine = Numbers


@dataclass(frozen=True)
class Issue:
    """A problem of a scan."""

    code: str
    severity: str  # "error" or "warning", for training
    sentence: str  # follows the file's name


@dataclass(frozen=True)
class Grid:
    """Where the voxels of a scan are."""

    shape: tuple[int, ...]  # of the file, (X, Y, Z) and any trailing axes of one
    affine: Affine  # (4, 4), voxel indices to RAS+ mm
    header: Any  # a NIfTI header that says the same; the file's own if it has one

    @property
    def spacing(self) -> npt.NDArray[np.float64]:
        """(3,) mm per axis."""
        return np.asarray(np.linalg.norm(self.affine[:3, :3], axis=0))

    @property
    def voxel_ml(self) -> float:
        """Volume of one voxel in ml."""
        return float(abs(np.linalg.det(self.affine[:3, :3]))) / 1000

    @classmethod
    def at(cls, shape: tuple[int, ...], affine: Affine) -> Grid:
        """The grid of a file that is not NIfTI: qform and sform alike, code 1 (scanner)."""
        header = nibabel.Nifti1Header()
        header.set_qform(affine, 1)
        header.set_sform(affine, 1)
        header.set_xyzt_units("mm")
        return cls(shape, affine, header)

    def copy_to(self, header: Any) -> None:
        """Puts a mask where the scan is: its forms, codes, voxel sizes and unit of length, to the last bit."""
        for name in FORMS:
            header[name] = self.header[name]
        header["pixdim"][:4] = self.header["pixdim"][:4]
        header["xyzt_units"] = int(self.header["xyzt_units"]) & 7


@dataclass(frozen=True)
class Volume:
    """A scan or label map as read."""

    data: npt.NDArray[Any]  # (X, Y, Z) or (X, Y, Z, C), scaling applied
    grid: Grid
    monai_affine: Affine  # (4, 4) in mm, what MONAI uses for the file; a fraction of a voxel from the grid's
    issues: tuple[Issue, ...] = ()  # what is wrong or doubtful about its header and values

    @property
    def affine(self) -> Affine:
        """(4, 4), voxel indices to RAS+ mm."""
        return self.grid.affine

    @property
    def channels_first(self) -> npt.NDArray[Any]:
        """A view (C, X, Y, Z) of the voxels."""
        return np.moveaxis(self.data, -1, 0) if self.data.ndim == 4 else self.data[None]


def affine_issue(affine: Affine) -> Issue | None:
    """What makes an affine unusable: it is not finite, flat, or its axes are not perpendicular. None: nothing."""
    lengths = np.linalg.norm(affine[:3, :3], axis=0)
    axes = affine[:3, :3] / np.where(lengths > 0, lengths, 1)
    if not np.isfinite(affine).all() or abs(np.linalg.det(axes)) < 1e-3:
        found = f"its header gives no usable position in space (affine {np.round(affine[:3], 4).tolist()})"
        sentence = f"{found}: axes must be finite, not zero and not parallel. Correct the header."
        return Issue("bad_affine", "error", sentence)
    degrees = math.degrees(math.asin(min(1.0, float(np.abs(axes.T @ axes - np.eye(3)).max()))))
    if degrees > MAX_SHEAR_DEGREES:
        found = f"two axes are {degrees:.1f} degrees off a right angle, at most {MAX_SHEAR_DEGREES:g} are accepted"
        cure = "a tilted gantry does this. Resample it, and its label map, onto perpendicular axes."
        return Issue("sheared", "error", f"its affine is sheared ({found}): {cure}")
    return None


def same_grid(shape: Sequence[int], affine: Affine, other: Affine) -> bool:
    """Whether two affines put each voxel of a shape (X, Y, Z, ...) at the same place; False if one is not finite."""
    edge = np.linalg.norm(np.asarray(affine)[:3, :3], axis=0).min()
    return bool(farthest_corner(shape, affine, other) <= NEAR * edge)


def farthest_corner(shape: Sequence[int], one: Affine, other: Affine) -> float:
    """Largest distance between equal corners of a grid (X, Y, Z, ...) under two affines, in their unit of length."""
    corners = np.array(list(itertools.product(*((-0.5, n - 0.5) for n in shape[:3]))))
    change = np.asarray(one, dtype=np.float64) - np.asarray(other, dtype=np.float64)
    return float(np.linalg.norm(corners @ change[:3, :3].T + change[:3, 3], axis=1).max())
