"""How good masks are: metrics per case and class, their summary, and pictures."""

from medseg_supcon.evaluation._metrics import case_metrics
from medseg_supcon.evaluation._report import MetricsReport
from medseg_supcon.evaluation._summary import summarise, write_metrics

__all__ = ["MetricsReport", "case_metrics", "summarise", "write_metrics"]
