"""Metrics of masks per case and class, their summary, and pictures."""

from medseg_supcon.evaluation.figures import (
    INK,
    PALETTE,
    color_of,
    curves_figure,
    dress,
    dress_epochs,
    dress_image,
    legend_below,
    new_figure,
    overlay_figure,
    save,
)
from medseg_supcon.evaluation.folders import evaluate_folders
from medseg_supcon.evaluation.metrics import Row, case_metrics
from medseg_supcon.evaluation.summary import (
    EMPTY_RULE,
    MetricsReport,
    add_problems,
    score_mask,
    summarise,
    write_metrics,
)
