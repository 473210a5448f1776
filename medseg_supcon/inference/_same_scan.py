"""Whether a mask that is there already lies on the grid of a scan, by the headers alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel
import numpy as np

from medseg_supcon.data import in_mm, one_place, unit_of_length
from medseg_supcon.inference._dicom_header import read_header
from medseg_supcon.inference._grid import Affine
from medseg_supcon.inference._itk import ras_affine, read_information
from medseg_supcon.inference._scans import Scan

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
