"""Data sets: layouts, cases, labels, splits, checks and phantoms."""

from medseg_supcon.datasets.check import check_dataset
from medseg_supcon.datasets.datalist import items, load_items, write_datalist
from medseg_supcon.datasets.dataset import Case, Dataset, read_case_names
from medseg_supcon.datasets.findings import Report
from medseg_supcon.datasets.labels import class_indices, label_mapping, label_type, snap_labels
from medseg_supcon.datasets.layouts import read_dataset, read_unlabelled
from medseg_supcon.datasets.phantoms import PHANTOM_LABELS, make_phantoms
from medseg_supcon.datasets.split import VALIDATION, Split, split_cases
