"""How good masks are: metrics per case and class, their summary, and pictures."""

from medseg_supcon.evaluation._compare_report import write_comparison
from medseg_supcon.evaluation._comparison import compare_recipes, recipe_means
from medseg_supcon.evaluation._curves import curves_figure
from medseg_supcon.evaluation._embedding import (
    Embedding,
    class_separation,
    principal_components,
    scatter_figure,
    t_sne,
)
from medseg_supcon.evaluation._folders import evaluate_folders
from medseg_supcon.evaluation._grid_report import write_grid
from medseg_supcon.evaluation._metrics import case_metrics
from medseg_supcon.evaluation._overlay import overlay_figure
from medseg_supcon.evaluation._report import MetricsReport
from medseg_supcon.evaluation._statistics import PairedDifference, paired_difference
from medseg_supcon.evaluation._summary import add_problems, summarise, write_metrics

__all__ = [
    "Embedding",
    "MetricsReport",
    "PairedDifference",
    "add_problems",
    "case_metrics",
    "class_separation",
    "compare_recipes",
    "curves_figure",
    "evaluate_folders",
    "overlay_figure",
    "paired_difference",
    "principal_components",
    "recipe_means",
    "scatter_figure",
    "summarise",
    "t_sne",
    "write_comparison",
    "write_grid",
    "write_metrics",
]
