"""Training a planned run, and everything that its ``train.yaml`` names."""

from medseg_supcon.training.cache import CachedDataset, cached_dataset
from medseg_supcon.training.checkpoint import Checkpoint, load_initial, save_atomically
from medseg_supcon.training.copy_paste import CopyPaste
from medseg_supcon.training.data import EpochSampler, SeededDataset, item_seed, two_view_dataset
from medseg_supcon.training.handlers import EarlyStop, GradientClip, LateValidation, StepSeed, StopOnNaN
from medseg_supcon.training.log import TrainingLog
from medseg_supcon.training.loss import DiceCrossEntropy, TwoViewLoss, label_pairs, prepare_views
from medseg_supcon.training.prepare import (
    Request,
    check_planned,
    is_of_plan,
    prepare_dataset,
    prepare_run,
    refuse_errors,
)
from medseg_supcon.training.progress import CountDisplay, ProgressDisplay
from medseg_supcon.training.ranks import (
    BlankFillerd,
    RankSampler,
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
from medseg_supcon.training.semi import MixedSampler, SemiSupervisedLoss, with_unknown
from medseg_supcon.training.teacher import PseudoLabels, Teacher, shipped_network
from medseg_supcon.training.throughput import (
    LossScale,
    amp_dtype,
    batch_bytes,
    compiled,
    keep_freed_memory,
    loader_workers,
    memory_format,
    tune_gpu,
    usual_amp_dtype,
)
from medseg_supcon.training.timing import (
    machine_name,
    peak_memory_gib,
    seconds_per_step,
    time_training,
    time_within_memory,
)
from medseg_supcon.training.train import (
    check_device,
    finish_ranks,
    is_complete,
    is_finished,
    run_config,
    train_run,
)
from medseg_supcon.training.two_stage import (
    StagedLoss,
    StagedNetwork,
    Stages,
    stage_at,
    stage_epochs,
    staged_schedule,
)
