"""Scans in, masks in each scan's own space out."""

from medseg_supcon.inference.evaluate_run import evaluate_dataset, evaluate_items, evaluate_validation, trained_on
from medseg_supcon.inference.find_scans import find_scans
from medseg_supcon.inference.manifest import Manifest
from medseg_supcon.inference.predictor import Predictor
from medseg_supcon.inference.prepare import GridMapping, Prediction, prepare_volume
from medseg_supcon.inference.sliding_window import (
    batch_on,
    is_out_of_memory,
    keep_freed_memory,
    tune_malloc,
    windows,
    with_less_memory,
)
