"""Whether a mask that is there already lies on the grid of a scan, by the headers alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel
import numpy as np

from medseg_supcon.inference._dicom_header import read_header
from medseg_supcon.inference._grid import Affine, one_place
from medseg_supcon.inference._itk import READERS, ras_affine
from medseg_supcon.inference._nifti import affine_in_mm
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

    sitk.ProcessObject.SetGlobalWarningDisplay(False)  # ITK's warnings quote tags of DICOM files
    reader = sitk.ImageFileReader()
    reader.SetImageIO("GDCMImageIO" if scan.kind == "dicom" else READERS[scan.files[0].suffix.lower()])
    reader.SetFileName(str(scan.files[0]))
    reader.ReadImageInformation()
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
    return (*image.shape, 1, 1)[:3], affine_in_mm(image.affine, image.header)
