"""What a NIfTI header says about place, where it says two things or nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from monai.data.utils import correct_nifti_header_if_necessary
from nibabel.spatialimages import HeaderDataError

from medseg_supcon.data._place import NEAR, farthest_corner

__all__ = ["Doubt", "header_doubts", "two_voxel_sizes"]

SAME_SIZE = 0.01  # by how much sform and pixdim may differ in a voxel's edge

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Doubt:
    """A doubt about a header: its short code, "error" or "warning", and a sentence that follows the file's name."""

    code: str
    severity: str
    sentence: str


def header_doubts(image: Any) -> tuple[Doubt, ...]:
    """What may be wrong with the place of a NIfTI image, whose affine is the sform, or without one the qform.

    MONAI, which reads the scans of a training, takes the qform where pixdim speaks for it: an error where that
    lies elsewhere. The NIfTI standard leaves to the reader which of two forms to believe.

    Args:
        image: as nibabel loads it; other formats than NIfTI have no doubts.
    """
    header = image.header
    if "sform_code" not in header or not np.isfinite(affine := np.asarray(image.affine, np.float64)).all():
        return ()
    if int(header["sform_code"]) <= 0:
        if int(header["qform_code"]) > 0:
            return ()
        sentence = (
            "its header gives no orientation (qform and sform codes 0): left and right are a guess. Convert "
            "it again from its source, or see that left is left."
        )
        return (Doubt("no_orientation", "warning", sentence),)
    if (sizes := two_voxel_sizes(image)) is not None:
        return (Doubt("two_voxel_sizes", "error", sizes),)
    return _two_places(image, affine, np.linalg.norm(affine[:3, :3], axis=0))


def two_voxel_sizes(image: Any) -> str | None:
    """A sentence where sform and pixdim of a NIfTI image differ in a voxel's edge by more than 1 %, else None."""
    edges = np.linalg.norm(np.asarray(image.affine, dtype=np.float64)[:3, :3], axis=0)
    stored = np.abs(np.asarray(image.header["pixdim"][1:4], dtype=np.float64))
    if np.allclose(edges, stored, rtol=SAME_SIZE, atol=0):
        return None
    says, differs = (" x ".join(f"{size:.4g}" for size in sizes) for sizes in (edges, stored))
    return (
        f"its header gives two voxel sizes, {says} by its sform and {differs} by its pixdim. Correct the one that "
        "is wrong."
    )


def _two_places(image: Any, affine: Floats, edges: Floats) -> tuple[Doubt, ...]:
    """qform against sform: an error where a training would take the qform, a warning where it would not."""
    shape, near = image.shape[:3], NEAR * float(edges.min())
    extent = float(np.linalg.norm(edges[: len(shape)] * shape))
    read = _apart(shape, affine, lambda: _as_monai_reads(image, affine))
    if not read <= near + SAME_SIZE * extent:  # an edge rounded in pixdim moves corners a little: no fault
        sentence = (
            "its qform and sform disagree, and its pixdim fits the qform better: programs read it in different "
            "places. Make the two forms equal."
        )
        return (Doubt("two_places", "error", sentence),)
    apart = _apart(shape, affine, image.header.get_qform)
    if int(image.header["qform_code"]) > 0 and not apart <= near:
        how = f"{apart:.3g} mm apart" if np.isfinite(apart) else "the qform is no rotation"
        sentence = f"its qform and sform disagree ({how}): the sform is used. See that left is left."
        return (Doubt("forms_disagree", "warning", sentence),)
    return ()


def _apart(shape: Sequence[int], affine: Floats, other: Callable[[], Floats]) -> float:
    """How far a second affine puts a corner from the first; infinity where it cannot be had."""
    try:
        return farthest_corner((*shape, 1, 1)[:3], affine, other())
    except (ValueError, HeaderDataError):  # a quaternion that turns nothing
        return float("inf")


def _as_monai_reads(image: Any, affine: Floats) -> Floats:
    """The affine that LoadImage takes; its correction changes an image, so it gets a hollow one."""
    voxels = np.broadcast_to(np.uint8(0), image.shape)
    hollow = type(image)(voxels, affine, image.header.copy())
    return np.asarray(correct_nifti_header_if_necessary(hollow).affine, dtype=np.float64)
