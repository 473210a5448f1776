"""Recipes compared with one another on one data set at equal budget: ``medseg compare``."""

from medseg_supcon.comparison.cell import is_done
from medseg_supcon.comparison.corruptions import CORRUPTIONS, corrupt_cases
from medseg_supcon.comparison.design import (
    Cell,
    ComparisonConfig,
    design_comparison,
    make_variants,
    read_comparison,
)
from medseg_supcon.comparison.jobs import WITHOUT_WORKING_FOLDER, compare, devices, run_jobs
from medseg_supcon.comparison.report import answer, caveats, on_degraded_scans, write_comparison
from medseg_supcon.comparison.results import Results, grid_table, means_of_tests, read_history
from medseg_supcon.comparison.runs import unequal_recipes
from medseg_supcon.comparison.statistics import compare_recipes, paired_difference, recipe_means, verdict
