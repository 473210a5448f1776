"""How far to trust a mask: evidence of the pass that made it, the Dice that it probably has, facts, a verdict."""

from medseg_supcon.quality.degrade import Degraded, degradations
from medseg_supcon.quality.evidence import Evidence, PassEvidence, mask_shape
from medseg_supcon.quality.model import QualityModel, Sample
from medseg_supcon.quality.verdict import agreement, facts, rate
