"""The faults of one case: its images, and whether label map and images fit each other."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import numpy.typing as npt

from medseg_supcon.data._check_label import look_at_label
from medseg_supcon.data._dataset import Case, Dataset
from medseg_supcon.data._looked import Looked, same_grid
from medseg_supcon.data._place import MAX_SHEAR_DEGREES, shear_degrees
from medseg_supcon.data._volume import Volume

__all__ = ["look_at"]


def look_at(case: Case, dataset: Dataset, tolerance: float, mismatch: str) -> Looked:
    """Read a case once and list its faults; `mismatch` is the severity of differing affines."""
    looked = Looked(case)
    images = [(path, volume) for path in case.images if (volume := looked.read(path)) is not None]
    complete = len(images) == len(case.images)
    images = [(path, volume) for path, volume in images if _is_scan(looked, path, volume, dataset)]
    if complete and len(images) == len(case.images):
        _channels(looked, images, dataset)
    for path, volume in images:
        _intensities(looked, path, volume.data)
    usable = [(path, volume) for path, volume in images if _geometry(looked, path, volume)]
    for path, volume in usable[1:]:
        same_grid(looked, path, volume, *usable[0], tolerance, mismatch)
    if case.label is not None:
        look_at_label(looked, case.label, dataset, usable[0] if usable else None, tolerance, mismatch)
    return looked


def _is_scan(looked: Looked, path: Path, volume: Volume, dataset: Dataset) -> bool:
    shape = volume.data.shape
    if 0 in shape:
        looked.tell(path, "empty_image", f"has no voxels (shape {shape}). Export it again.")
    elif len(shape) < 3:
        looked.tell(path, "not_3d", f"is {len(shape)}-D (shape {shape}), expected a 3-D scan. Leave it out.")
    elif len(shape) > 4 or (len(shape) == 4 and (len(looked.case.images) > 1 or len(dataset.channels) == 1)):
        looked.tell(
            path,
            "not_3d",
            f"is {len(shape)}-D (shape {shape}), expected one 3-D scan. Save one volume of the series, or "
            f"declare its channels in dataset.json.",
        )
    else:
        return True
    return False


def _channels(looked: Looked, images: list[tuple[Path, Volume]], dataset: Dataset) -> None:
    found = sum(volume.data.shape[3] if volume.data.ndim == 4 else 1 for _, volume in images)
    if found != len(dataset.channels):
        looked.tell(
            images[0][0],
            "channels",
            f"the case has {found} channel{'s' * (found != 1)}, the data set {len(dataset.channels)} "
            f"({', '.join(dataset.channels)}). Add or remove channels, or correct the declaration.",
        )


def _intensities(looked: Looked, path: Path, data: npt.NDArray[Any]) -> None:
    channels = [data[..., c] for c in range(data.shape[3])] if data.ndim == 4 else [data]
    for number, channel in enumerate(channels):
        where = f"channel {number} " if len(channels) > 1 else ""
        if channel.dtype.kind == "f" and not (finite := np.isfinite(channel)).all():
            bad = int(channel.size - np.count_nonzero(finite))
            looked.tell(
                path, "not_finite", f"{where}holds {bad} voxels that are NaN or Inf. Repair or leave it out."
            )
            continue
        low, high = float(channel.min()), float(channel.max())
        if low == high:
            looked.tell(
                path,
                "constant_image",
                f"{where}has the value {low:g} everywhere: an empty scan. Leave it out.",
            )
            continue
        voxels = np.ascontiguousarray(channel.T, dtype=np.float32)  # NIfTI lies in Fortran order
        content = hashlib.blake2b(voxels.data, digest_size=16, person=b"voxels")
        content.update(repr(voxels.shape).encode())
        looked.contents.append((path, content.digest()))


def _geometry(looked: Looked, path: Path, volume: Volume) -> bool:
    shape, axes = volume.data.shape[:3], volume.affine[:3, :3]
    if not np.isfinite(volume.affine).all() or abs(np.linalg.det(axes)) < 1e-12:
        looked.tell(path, "bad_affine", "its affine is no geometry (zero or not finite). Export it again.")
        return False
    if volume.unit != "mm":
        looked.tell(
            path, "unit", f"gives lengths in {volume.unit}, expected mm. Correct its header, or convert it."
        )
    if (degrees := shear_degrees(volume.affine)) > MAX_SHEAR_DEGREES:
        looked.tell(
            path,
            "sheared",
            f"its axes are {degrees:.1f} degrees off a right angle, at most {MAX_SHEAR_DEGREES:g} are taken; a "
            "tilted gantry does this. Resample it, and its label map, onto a grid with perpendicular axes.",
        )
    for doubt in volume.doubts:
        looked.tell(path, doubt.code, doubt.sentence, doubt.severity)
    spacing = np.linalg.norm(axes, axis=0)
    order = np.argsort(nibabel.orientations.io_orientation(volume.affine)[:, 0])
    if looked.spacing is None:
        looked.spacing, looked.extent = spacing[order], (spacing * shape)[order]
        if 1 in shape:
            looked.tell(
                path, "single_slice", f"is a single slice (shape {shape}). Training is in 3-D.", "warning"
            )
    return True
