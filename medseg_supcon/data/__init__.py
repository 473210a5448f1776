"""Data sets: find and check one, split it, take its fingerprint, plan for it, or make one of phantoms."""

from medseg_supcon.data._check import check_dataset
from medseg_supcon.data._dataset import Case, Dataset, read_case_names
from medseg_supcon.data._fingerprint import CaseFingerprint, Fingerprint, fingerprint
from medseg_supcon.data._forms import two_voxel_sizes
from medseg_supcon.data._items import items, load_items, write_datalist
from medseg_supcon.data._labels import class_indices, label_mapping, label_type, snap_labels
from medseg_supcon.data._layouts import read_dataset, read_unlabelled
from medseg_supcon.data._literal import literal
from medseg_supcon.data._phantoms import PHANTOM_LABELS, make_phantoms
from medseg_supcon.data._place import (
    MAX_SHEAR_DEGREES,
    NEAR,
    farthest_corner,
    in_mm,
    one_place,
    shear_degrees,
    unit_of_length,
)
from medseg_supcon.data._plan import make_plan
from medseg_supcon.data._plan_file import read_plan, validate_plan, write_plan
from medseg_supcon.data._preprocessing import LabelPreprocessingd, read_preprocessing
from medseg_supcon.data._report import Finding, Report
from medseg_supcon.data._split import VALIDATION, Split, split_cases
from medseg_supcon.data._unreadable import not_a_file, promises_too_much, unreadable
from medseg_supcon.data._volume import NIFTI_ENDINGS, read_header, read_volume, read_voxels

__all__ = [
    "MAX_SHEAR_DEGREES",
    "NEAR",
    "NIFTI_ENDINGS",
    "PHANTOM_LABELS",
    "VALIDATION",
    "Case",
    "CaseFingerprint",
    "Dataset",
    "Finding",
    "Fingerprint",
    "LabelPreprocessingd",
    "Report",
    "Split",
    "check_dataset",
    "class_indices",
    "farthest_corner",
    "fingerprint",
    "in_mm",
    "items",
    "label_mapping",
    "label_type",
    "literal",
    "load_items",
    "make_phantoms",
    "make_plan",
    "not_a_file",
    "one_place",
    "promises_too_much",
    "read_case_names",
    "read_dataset",
    "read_header",
    "read_plan",
    "read_preprocessing",
    "read_unlabelled",
    "read_volume",
    "read_voxels",
    "shear_degrees",
    "snap_labels",
    "split_cases",
    "two_voxel_sizes",
    "unit_of_length",
    "unreadable",
    "validate_plan",
    "write_datalist",
    "write_plan",
]
