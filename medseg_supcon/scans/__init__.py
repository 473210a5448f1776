"""The only reader and writer of scans, for training and prediction: grids, NIfTI, MetaImage, NRRD and DICOM."""

from medseg_supcon.scans.dicom import Series, check_series, is_one_of_many, read_whole_header, series_in
from medseg_supcon.scans.nifti import NIFTI_ENDINGS, is_whole, not_a_file, read_header, read_nifti, write_nifti
from medseg_supcon.scans.reader import Scan, is_mask_of, kind_of, read_scan, scan_header, stem
from medseg_supcon.scans.volume import (
    Affine,
    Grid,
    Volume,
    affine_issue,
    as_whole,
    count_values,
    farthest_corner,
    in_parallel,
    outliers,
    same_grid,
    slabs,
)
