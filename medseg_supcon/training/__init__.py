"""Training a planned run, and everything that its ``train.yaml`` names."""

from medseg_supcon.training.average import WeightAverage
from medseg_supcon.training.checkpoint import Checkpoint, load_initial, read_checkpoint, save_atomically
from medseg_supcon.training.data import (
    CachedDataset,
    EpochSampler,
    SeededDataset,
    cached_dataset,
    item_seed,
    prepare_case,
    two_view_dataset,
)
from medseg_supcon.training.handlers import (
    EarlyStop,
    GradientClip,
    LateValidation,
    LossScale,
    StepSeed,
    StopOnNaN,
    StopWithoutFolder,
)
from medseg_supcon.training.log import CountDisplay, ProgressDisplay, TrainingLog
from medseg_supcon.training.loss import (
    DiceCrossEntropy,
    PseudoLabels,
    SemiSupervisedLoss,
    Teacher,
    TwoViewLoss,
    class_probabilities,
    label_pairs,
    output_pairs,
    predicted_classes,
    prepare_views,
    shipped_network,
    with_unknown,
)
from medseg_supcon.training.precision import Precision, has_bfloat16, pass_seconds
from medseg_supcon.training.prepare import (
    Request,
    is_of_plan,
    prepare_dataset,
    prepare_run,
    refresh_documents,
    refuse_errors,
    requested_cases,
)
from medseg_supcon.training.quality import fit_quality, quality_samples
from medseg_supcon.training.ranks import (
    BlankFillerd,
    RankSampler,
    batch_share,
    distributed,
    join_ranks,
    leave_ranks,
    rank_device,
    rank_share,
    ranks_here,
)
from medseg_supcon.training.speed import (
    amp_dtype,
    batch_bytes,
    check_device,
    compiled,
    loader_workers,
    machine_name,
    peak_memory_gib,
    seconds_per_step,
    time_training,
    time_within_memory,
    tune_gpu,
    usual_amp_dtype,
)
from medseg_supcon.training.tracking import check_tracker
from medseg_supcon.training.train import (
    begin_training,
    check_planned,
    evaluate_and_document,
    extend_training,
    is_complete,
    is_finished,
    run_config,
    train_run,
)
from medseg_supcon.training.two_stage import StagedLoss, StagedNetwork, Stages, stage_at, stage_epochs, staged_schedule
