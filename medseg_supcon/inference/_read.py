"""Any scan to voxels and a grid."""

from __future__ import annotations

from medseg_supcon.data import not_a_file
from medseg_supcon.errors import DataError
from medseg_supcon.inference._grid import Volume
from medseg_supcon.inference._itk import read_itk
from medseg_supcon.inference._nifti import read_nifti
from medseg_supcon.inference._scans import Scan


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
