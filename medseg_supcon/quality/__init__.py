"""How far to trust a mask: evidence of the pass that made it, its probable Dice, facts, a verdict; and a page to review."""

from medseg_supcon.quality.degrade import INTENSITY, Degraded, degradations
from medseg_supcon.quality.evidence import Evidence, PassEvidence, dice_per_class, mask_shape
from medseg_supcon.quality.model import QualityModel, Sample
from medseg_supcon.quality.page import write_page
from medseg_supcon.quality.review import Entry, folder_entries, urgency, write_pictures, write_table
from medseg_supcon.quality.verdict import agreement, facts, rate
