"""Data sets: layouts, cases, labels, splits, checks and phantoms."""

from medseg_supcon.datasets.check import Finding, Report, check_dataset
from medseg_supcon.datasets.dataset import (
    VALIDATION,
    Case,
    Dataset,
    Folds,
    Split,
    group_of,
    items,
    load_items,
    normalisation,
    read_case_names,
    read_datalist,
    split_cases,
    write_datalist,
)
from medseg_supcon.datasets.fingerprints import CaseFingerprint, Fingerprint, fingerprint, readable
from medseg_supcon.datasets.folds import split_folds
from medseg_supcon.datasets.labels import class_indices, label_type, reorient, snap_labels, value_text
from medseg_supcon.datasets.layouts import read_dataset, read_label_plan, read_unlabelled
from medseg_supcon.datasets.phantoms import PHANTOM_LABELS, make_phantoms
from medseg_supcon.datasets.regions import (
    THRESHOLD,
    Regions,
    is_in,
    mask_labels,
    output_channels,
    target_names,
    values_in,
    values_of,
)
