"""Recipes compared with one another on one data set at equal budget: ``medseg compare``."""

from medseg_supcon.comparison.corruptions import CORRUPTIONS, corrupt_cases
from medseg_supcon.comparison.design import ComparisonConfig, design_comparison, make_variants, read_comparison
from medseg_supcon.comparison.folds import train_folds
from medseg_supcon.comparison.jobs import WITHOUT_WORKING_FOLDER, devices, is_done, run_jobs
from medseg_supcon.comparison.postprocessing import Mask, choose_postprocessing
from medseg_supcon.comparison.report import Results, answer, caveats, on_degraded_scans, write_comparison
from medseg_supcon.comparison.runs import compare, unequal_recipes
from medseg_supcon.comparison.statistics import compare_recipes, grid_table, paired_difference, recipe_means, verdict
