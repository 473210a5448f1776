"""From a data set's fingerprint to the plan of a run, and the preprocessing that it defines."""

from medseg_supcon.plan.preprocessing import (
    LabelPreprocessingd,
    intensity_problem,
    literal,
    plan_preprocessing,
    read_preprocessing,
)
from medseg_supcon.plan.rules import default_epochs, make_plan, plan_warnings, read_plan, validate_plan, write_plan
from medseg_supcon.plan.segments import code_parts, segment_codes
