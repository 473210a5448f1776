"""Any scan in, the mask in its own space out."""

from medseg_supcon.inference._export import export_model
from medseg_supcon.inference._memory import is_out_of_memory
from medseg_supcon.inference._predictor import Prediction, Predictor
from medseg_supcon.inference._scans import Scan, find_scans

__all__ = ["Prediction", "Predictor", "Scan", "export_model", "find_scans", "is_out_of_memory"]
