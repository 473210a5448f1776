"""What a NIfTI header says about place: where it says two things or nothing, and what MONAI makes of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from monai.data.utils import correct_nifti_header_if_necessary
from nibabel.spatialimages import HeaderDataError

from medseg_supcon.scans.grid import NEAR, Affine, Issue, farthest_corner, unit_of_length

SAME_SIZE = 0.01  # by how much sform and pixdim may differ in a voxel's edge


def check_header(image: Any) -> tuple[Affine, tuple[Issue, ...]]:
    """The affine that MONAI uses for a NIfTI image as nibabel loads it, and what may be wrong with its place.

    nibabel's affine is the sform, or without one the qform. MONAI, which reads the scans of a training, takes
    the qform if pixdim fits it better: an error if that is elsewhere. The NIfTI standard leaves to the reader
    which of two forms to believe. `read_scan` warns instead: a mask is right in both forms.

    Returns:
        (4, 4) in the header's unit, within a fraction of a voxel of `image.affine`; issues.
    """
    affine, shape = np.array(image.affine, dtype=np.float64), image.shape[:3]
    if not np.isfinite(affine).all():
        return affine, ()
    edges = np.linalg.norm(affine[:3, :3], axis=0)
    near = NEAR * float(edges.min())
    q_code, s_code = int(image.header["qform_code"]), int(image.header["sform_code"])
    issues = []
    if (unit := unit_of_length(image.header)) != "mm":
        sentence = f"its header gives lengths in {unit}, expected mm. Correct the header, or convert it."
        issues.append(Issue("unit", "error", sentence))
    if q_code <= 0 and s_code <= 0:
        sentence = (
            "its header gives no orientation (qform and sform codes 0): left and right are a guess. Convert it again "
            "from its source, or check that left is left."
        )
        issues.append(Issue("no_orientation", "warning", sentence))
    theirs, apart = _apart(shape, affine, lambda: _as_monai_reads(image, affine))
    if s_code > 0 or q_code > 0:
        sizes = np.abs(np.asarray(image.header["pixdim"][1:4], dtype=np.float64))
        if not np.allclose(edges, sizes, rtol=SAME_SIZE, atol=0):
            issues.append(Issue("two_voxel_sizes", "error", _two_sizes(edges, sizes)))
        elif s_code > 0:
            issues += _two_places(image, affine, edges, apart, near)
    return (theirs if apart <= near else affine), tuple(issues)


def _two_sizes(edges: Affine, stored: Affine) -> str:
    says, differs = (" x ".join(f"{size:.4g}" for size in sizes) for sizes in (edges, stored))
    return (
        f"its header gives two voxel sizes, {says} by its sform and {differs} by its pixdim. Correct the one that "
        "is wrong."
    )


def _two_places(image: Any, affine: Affine, edges: Affine, read: float, near: float) -> list[Issue]:
    """qform against sform: an error if a training would take the qform, a warning if it would not."""
    shape = image.shape[:3]
    extent = float(np.linalg.norm(edges[: len(shape)] * shape))
    if not read <= near + SAME_SIZE * extent:  # an edge rounded in pixdim moves corners a little: no fault
        sentence = (
            "its qform and sform disagree, and its pixdim fits the qform better: programs read it in different "
            "places. Make the two forms equal."
        )
        return [Issue("two_places", "error", sentence)]
    _, apart = _apart(shape, affine, image.header.get_qform)
    if int(image.header["qform_code"]) > 0 and not apart <= near:
        how = f"{apart:.3g} mm apart" if np.isfinite(apart) else "the qform is not a rotation"
        sentence = f"its qform and sform disagree ({how}): the sform is used. Check that left is left."
        return [Issue("forms_disagree", "warning", sentence)]
    return []


def _apart(shape: Sequence[int], affine: Affine, read: Callable[[], Affine]) -> tuple[Affine, float]:
    """A second affine, and how far it puts a corner from the first; infinity if it is not valid."""
    try:
        other = read()
        return other, farthest_corner((*shape, 1, 1)[:3], affine, other)
    except (ValueError, HeaderDataError):  # a quaternion that is not a rotation
        return affine, float("inf")


def _as_monai_reads(image: Any, affine: Affine) -> Affine:
    """The affine that LoadImage takes; its correction changes an image, so it gets a hollow one."""
    voxels = np.broadcast_to(np.uint8(0), image.shape)
    hollow = type(image)(voxels, affine, image.header.copy())
    return np.asarray(correct_nifti_header_if_necessary(hollow).affine, dtype=np.float64)
