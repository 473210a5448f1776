"""Reading a scan from NIfTI files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import numpy.typing as npt
from monai.data.utils import correct_nifti_header_if_necessary

from medseg_supcon.errors import DataError
from medseg_supcon.scans.grid import Grid, check_affine, check_values, in_mm, one_place, unit_of_length
from medseg_supcon.scans.grid import ScanVolume as Volume
from medseg_supcon.scans.nifti import not_a_file, promises_too_much, read_voxels, two_voxel_sizes, unreadable


def dimensions(path: Path) -> tuple[int, ...]:
    """The shape in a NIfTI header; (0, 0, 0) where it cannot be read (reading the scan will say why)."""
    try:
        return tuple(int(n) for n in nibabel.load(path).shape)
    except Exception:  # nibabel raises a dozen kinds for broken headers
        return (0, 0, 0)


def read_nifti(files: Sequence[Path], channels: int) -> Volume:
    """One scan from one NIfTI file, or from one per channel.

    Raises:
        DataError: a file is damaged, is no 3-D scan, has too many or few channels, or differs from the first.
    """
    volumes = [_read_one(file) for file in files]
    first = volumes[0]
    for file, volume in zip(files[1:], volumes[1:], strict=True):
        if volume.data.shape != first.data.shape or not one_place(
            first.grid.shape, first.grid.affine, volume.grid.affine
        ):
            raise DataError(
                f"{file}: its shape or affine differs from that of {files[0]}. Channels must share a grid."
            )
    data = first.data if len(volumes) == 1 else np.concatenate([v.data for v in volumes])
    if len(data) != channels:
        raise DataError(wrong_channels(files[0], len(data), channels))
    return Volume(data, first.grid, first.affine, first.warnings)


def wrong_channels(file: Path, found: int, expected: int) -> str:
    """The sentence for a scan with a number of channels that the model does not take."""
    if expected == 1:
        return (
            f"{file}: holds {found} volumes (a time series or several channels), and the model takes one 3-D "
            "scan. Split it and give the volume that you want segmented."
        )
    return (
        f"{file}: holds {found} channels, and the model takes {expected}. Give one 4-D file, channels last, "
        "or 3-D files called NAME_0000, NAME_0001, ... in the order of the plan's channels."
    )


def _read_one(file: Path) -> Volume:
    try:
        if (problem := not_a_file(file)) is not None:
            raise DataError(problem)
        image: Any = nibabel.load(file)
        if not isinstance(image, nibabel.Nifti1Image):
            raise DataError(f"{file}: expected NIfTI, found {type(image).__name__}. Convert it to .nii.gz.")
        shape = tuple(int(n) for n in image.shape)
        if 0 in shape:
            raise DataError(f"{file}: expected a 3-D scan, found no voxels (shape {shape}). Export it again.")
        if len(shape) < 3:
            raise DataError(
                f"{file}: expected a 3-D scan, found shape {shape}. 2-D images are not segmented."
            )
        extra = [n for n in shape[3:] if n > 1]
        if len(extra) > 1:
            raise DataError(
                f"{file}: expected a 3-D scan or channels in a fourth axis, found shape {shape}. Split it."
            )
        if (problem := promises_too_much(file, image)) is not None:
            raise DataError(problem)
        data = check_values(read_voxels(image, file), file)
        channels = extra[0] if extra else 1
        grid, warnings = _grid(image, shape if channels == 1 else shape[:3], file)
        affine = _affine_of_model(image, file)
    except (DataError, MemoryError):
        raise
    except Exception as error:  # nibabel and gzip raise a dozen kinds for damaged files
        raise DataError(unreadable(file, error)) from error
    # NIfTI stores x fastest: keep that order, and have the channels first.
    data = np.moveaxis(data.reshape((*shape[:3], channels), order="F"), -1, 0)
    affine = in_mm(check_affine(affine, file), unit_of_length(grid.header))
    return Volume(data, grid, affine, warnings)


def _grid(image: Any, shape: tuple[int, ...], file: Path) -> tuple[Grid, list[str]]:
    header, warnings = image.header.copy(), []
    affine = check_affine(image.affine, file)
    q_code, s_code = int(header["qform_code"]), int(header["sform_code"])
    if q_code == 0 and s_code == 0:
        warnings.append(
            "the header gives no orientation (qform and sform codes 0): left and right are a guess"
        )
    elif q_code > 0 and s_code > 0:
        try:
            agree = one_place(shape, affine, header.get_qform())
        except ValueError:  # a quaternion that turns nothing
            agree = False
        if not agree:
            warnings.append("qform and sform disagree: the sform was used")
    unit = unit_of_length(header)
    if unit != "mm":
        warnings.append(f"the header gives lengths in {unit}, and they were taken so")
    return Grid(shape, in_mm(affine, unit), header), warnings


def _affine_of_model(image: Any, file: Path) -> npt.NDArray[np.float64]:
    """The affine that MONAI would take, which is another than the sform where that does not match pixdim.

    Only to within a fraction of a voxel: else the model would see the scan elsewhere than its mask will lie.
    """
    if (sentence := two_voxel_sizes(image)) is not None:
        raise DataError(f"{file}: {sentence}")
    affine = np.array(image.affine, dtype=np.float64)  # a copy: the correction changes the image
    theirs = np.asarray(correct_nifti_header_if_necessary(image).affine, dtype=np.float64)
    return theirs if one_place(image.shape, affine, theirs) else affine
