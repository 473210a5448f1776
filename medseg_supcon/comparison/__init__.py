"""Recipes against one another on one data set, at equal budget: ``medseg compare``."""

from medseg_supcon.comparison._compare import compare
from medseg_supcon.comparison._config import ComparisonConfig, read_comparison
from medseg_supcon.comparison._corruptions import CORRUPTIONS, corrupt_cases
from medseg_supcon.comparison._design import Cell, Design, design_comparison
from medseg_supcon.comparison._variants import Variant, make_variants

__all__ = [
    "CORRUPTIONS",
    "Cell",
    "ComparisonConfig",
    "Design",
    "Variant",
    "compare",
    "corrupt_cases",
    "design_comparison",
    "make_variants",
    "read_comparison",
]
