"""Whether a mask that is there already lies on the grid of a scan, by the headers alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel
import numpy as np

from medseg_supcon.errors import DataError
from medseg_supcon.inference.find_scans import Scan
from medseg_supcon.scans import (
    Affine,
    in_mm,
    not_a_file,
    one_place,
    ras_affine,
    read_information,
    read_itk,
    read_nifti,
    unit_of_length,
)
from medseg_supcon.scans import ScanVolume as Volume
from medseg_supcon.scans import read_dicom_header as read_header


def read_scan(scan: Scan, channels: int) -> Volume:
    """Reads a scan with the reader of its kind.

    Raises:
        DataError: it cannot be read, or is not a scan that the model takes.
    """
    if scan.problem is not None:
        raise DataError(scan.problem)
    for file in scan.files:
        if (problem := not_a_file(file)) is not None:
            raise DataError(problem)
    if scan.kind == "nifti":
        return read_nifti(scan.files, channels)
    return read_itk(scan.files, channels, dicom=scan.kind == "dicom")


Placed = tuple[tuple[int, ...], Affine]


def is_mask_of(mask: Path, scan: Scan) -> bool:
    """Whether a mask has the grid of a scan; True where one cannot be read (reading it will say why)."""
    try:
        shape, affine = _nifti(mask)
        expected, place = _place(scan)
    except Exception:  # nibabel and SimpleITK raise a dozen kinds for broken headers
        return True
    return shape == expected and one_place(shape, place, affine)


def _place(scan: Scan) -> Placed:
    if scan.kind == "nifti":
        return _nifti(scan.files[0])
    import SimpleITK as sitk

    reader = read_information(scan.files[0], scan.kind == "dicom")
    size = (*reader.GetSize(), 1)[:3]
    volume = sitk.Image(1, 1, 1, sitk.sitkUInt8)
    volume.SetSpacing((*reader.GetSpacing(), 1.0)[:3])
    volume.SetOrigin((*reader.GetOrigin(), 0.0)[:3])
    dimension = reader.GetDimension()
    turn = np.eye(max(3, dimension))
    turn[:dimension, :dimension] = np.reshape(reader.GetDirection(), (dimension, dimension))
    volume.SetDirection(turn[:3, :3].ravel().tolist())
    affine = ras_affine(volume)
    if len(scan.files) > 1 and scan.kind == "dicom":
        size = (*size[:2], len(scan.files))
        affine[:3, 2] = _step(scan)
    return tuple(int(n) for n in size), affine


def _step(scan: Scan) -> Any:
    """From slice to slice in RAS+ mm; a DICOM slice says only where it lies itself."""
    first, last = read_header(scan.files[0]), read_header(scan.files[-1])
    if first is None or last is None or first.positions is None or last.positions is None:
        raise ValueError("a slice says no position")
    return (last.positions[0] - first.positions[0]) * (-1, -1, 1) / (len(scan.files) - 1)


def _nifti(path: Path) -> Placed:
    image: Any = nibabel.load(path)
    return (*image.shape, 1, 1)[:3], in_mm(image.affine, unit_of_length(image.header))
