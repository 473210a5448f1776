"""Training: a planned run on disk, and everything that its ``train.yaml`` names."""

from medseg_supcon.training._batch import TwoViewLoss, prepare_views
from medseg_supcon.training._cache import cached_dataset
from medseg_supcon.training._checkpoint import Checkpoint, load_initial, load_tensors, save_atomically
from medseg_supcon.training._copy_paste import CopyPaste
from medseg_supcon.training._data import (
    EpochSampler,
    SeededDataset,
    item_seed,
    two_view_dataset,
)
from medseg_supcon.training._finish import finish_ranks
from medseg_supcon.training._folder import is_planned, is_started
from medseg_supcon.training._log import TrainingLog
from medseg_supcon.training._memory import keep_freed_memory
from medseg_supcon.training._metadata import read_config
from medseg_supcon.training._metrics import label_pairs
from medseg_supcon.training._mixed import MixedSampler, with_unknown
from medseg_supcon.training._optimise import EarlyStop, GradientClip, LateValidation, StepSeed, StopOnNaN
from medseg_supcon.training._overlay import parse_setting, read_yaml
from medseg_supcon.training._progress import ProgressDisplay
from medseg_supcon.training._rank_sampler import RankSampler
from medseg_supcon.training._ranks import (
    BlankFillerd,
    batch_share,
    distributed,
    join_ranks,
    leave_ranks,
    rank,
    rank_device,
    rank_share,
    ranks_here,
    world_size,
)
from medseg_supcon.training._recipes import describe_recipe, read_recipe, recipe_names, shared_folder
from medseg_supcon.training._run import is_of_plan, prepare_run, refresh_documents
from medseg_supcon.training._segmentation import DiceCrossEntropy
from medseg_supcon.training._semi_loss import SemiSupervisedLoss
from medseg_supcon.training._staged_loss import StagedLoss
from medseg_supcon.training._staged_network import StagedNetwork
from medseg_supcon.training._stages import Stages, stage_at, stage_epochs, staged_schedule
from medseg_supcon.training._teacher import PseudoLabels, Teacher, shipped_network
from medseg_supcon.training._throughput import (
    LossScale,
    amp_dtype,
    compiled,
    memory_format,
    tune_gpu,
    usual_amp_dtype,
)
from medseg_supcon.training._timing import machine_name, peak_memory_gib
from medseg_supcon.training._train import check_device, is_complete, is_finished, run_config, train_run
from medseg_supcon.training._workers import loader_workers

__all__ = [
    "BlankFillerd",
    "Checkpoint",
    "CopyPaste",
    "DiceCrossEntropy",
    "EarlyStop",
    "EpochSampler",
    "GradientClip",
    "LateValidation",
    "LossScale",
    "MixedSampler",
    "ProgressDisplay",
    "PseudoLabels",
    "RankSampler",
    "SeededDataset",
    "SemiSupervisedLoss",
    "StagedLoss",
    "StagedNetwork",
    "Stages",
    "StepSeed",
    "StopOnNaN",
    "Teacher",
    "TrainingLog",
    "TwoViewLoss",
    "amp_dtype",
    "batch_share",
    "cached_dataset",
    "check_device",
    "compiled",
    "describe_recipe",
    "distributed",
    "finish_ranks",
    "is_complete",
    "is_finished",
    "is_of_plan",
    "is_planned",
    "is_started",
    "item_seed",
    "join_ranks",
    "keep_freed_memory",
    "label_pairs",
    "leave_ranks",
    "load_initial",
    "load_tensors",
    "loader_workers",
    "machine_name",
    "memory_format",
    "parse_setting",
    "peak_memory_gib",
    "prepare_run",
    "prepare_views",
    "rank",
    "rank_device",
    "rank_share",
    "ranks_here",
    "read_config",
    "read_recipe",
    "read_yaml",
    "recipe_names",
    "refresh_documents",
    "run_config",
    "save_atomically",
    "shared_folder",
    "shipped_network",
    "stage_at",
    "stage_epochs",
    "staged_schedule",
    "train_run",
    "tune_gpu",
    "two_view_dataset",
    "usual_amp_dtype",
    "with_unknown",
    "world_size",
]
