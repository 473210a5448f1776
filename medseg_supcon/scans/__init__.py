"""The only reader and writer of scans."""

from medseg_supcon.scans.dicom import Series, is_one_of_many, series_in
from medseg_supcon.scans.dicom_header import ENDINGS, looks_like_dicom, read_dicom_header
from medseg_supcon.scans.grid import (
    MAX_SHEAR_DEGREES,
    Affine,
    Grid,
    ScanVolume,
    farthest_corner,
    in_mm,
    one_place,
    shear_degrees,
    unit_of_length,
)
from medseg_supcon.scans.itk import READERS, ras_affine, read_information, read_itk
from medseg_supcon.scans.nifti import (
    NIFTI_ENDINGS,
    Volume,
    as_whole,
    count_values,
    in_parallel,
    not_a_file,
    read_header,
    read_volume,
    slabs,
    stem,
)
from medseg_supcon.scans.scan_nifti import dimensions, read_nifti
from medseg_supcon.scans.writer import is_whole, keep_largest, write_nifti
