"""Two differently augmented views of one patch, and which voxel of one is which voxel of the other."""

from medseg_supcon.views.policies import (
    crop_resize_view,
    identity_view,
    randaugment_view,
    simclr_view,
    standard_view,
    usual_bias_field,
)
from medseg_supcon.views.scanner_shifts import SCANNER_SHIFTS, ScannerShiftd, ghost_weights, usual_scanner_shifts
from medseg_supcon.views.spatial import AffinePatchd
from medseg_supcon.views.two_views import ForegroundIndexd, TwoViewsd, has_untracked, leaves, moves_voxels
