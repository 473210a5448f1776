"""The only reader and writer of scans, for training and prediction: grids, NIfTI, MetaImage, NRRD and DICOM."""

from medseg_supcon.scans.dicom import Series, is_one_of_many, series_in
from medseg_supcon.scans.dicom_file import DICOM_ENDINGS, looks_like_dicom
from medseg_supcon.scans.grid import Affine, Grid, Volume, affine_issue, farthest_corner, same_grid
from medseg_supcon.scans.itk import ITK_ENDINGS
from medseg_supcon.scans.nifti import (
    NIFTI_ENDINGS,
    is_whole,
    not_a_file,
    read_header,
    read_nifti,
    stem,
    write_nifti,
)
from medseg_supcon.scans.reader import Kind, Scan, is_mask_of, read_scan, scan_header
from medseg_supcon.scans.voxels import as_whole, count_values, in_parallel, outliers, slabs
