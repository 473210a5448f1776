"""Metrics of masks per case and class, their summary, and pictures."""

from medseg_supcon.evaluation.figures import (
    INK,
    color_of,
    curves_figure,
    dress,
    dress_image,
    legend_below,
    new_figure,
    overlay_figure,
    read_history,
    save,
)
from medseg_supcon.evaluation.folders import evaluate_folders
from medseg_supcon.evaluation.metrics import (
    EMPTY_RULE,
    MetricsReport,
    Row,
    case_metrics,
    score_mask,
    summarise,
    write_metrics,
)
