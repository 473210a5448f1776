"""Recipes against one another on one data set, at equal budget: ``medseg compare``."""

from medseg_supcon.comparison._compare import compare
from medseg_supcon.comparison._corruptions import CORRUPTIONS, corrupt_cases
from medseg_supcon.comparison._design import Cell, Design, design_comparison

__all__ = ["CORRUPTIONS", "Cell", "Design", "compare", "corrupt_cases", "design_comparison"]
