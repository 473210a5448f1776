"""Training: a planned run on disk, and everything that its ``train.yaml`` names."""

from medseg_supcon.training._batch import TwoViewLoss, prepare_views
from medseg_supcon.training._checkpoint import Checkpoint, load_initial, load_tensors, save_atomically
from medseg_supcon.training._data import (
    EpochSampler,
    SeededDataset,
    cached_dataset,
    item_seed,
    two_view_dataset,
)
from medseg_supcon.training._log import TrainingLog
from medseg_supcon.training._metrics import label_pairs
from medseg_supcon.training._optimise import EarlyStop, GradientClip, IntervalValidation, StepSeed, StopOnNaN
from medseg_supcon.training._overlay import parse_setting
from medseg_supcon.training._progress import ProgressDisplay
from medseg_supcon.training._recipes import read_recipe, recipe_names, shared_folder
from medseg_supcon.training._run import is_planned, is_started, prepare_run, refresh_documents
from medseg_supcon.training._segmentation import DiceCrossEntropy
from medseg_supcon.training._train import check_device, is_finished, run_config, train_run

__all__ = [
    "Checkpoint",
    "DiceCrossEntropy",
    "EarlyStop",
    "EpochSampler",
    "GradientClip",
    "IntervalValidation",
    "ProgressDisplay",
    "SeededDataset",
    "StepSeed",
    "StopOnNaN",
    "TrainingLog",
    "TwoViewLoss",
    "cached_dataset",
    "check_device",
    "is_finished",
    "is_planned",
    "is_started",
    "item_seed",
    "label_pairs",
    "load_initial",
    "load_tensors",
    "parse_setting",
    "prepare_run",
    "prepare_views",
    "read_recipe",
    "recipe_names",
    "refresh_documents",
    "run_config",
    "save_atomically",
    "shared_folder",
    "train_run",
    "two_view_dataset",
]
