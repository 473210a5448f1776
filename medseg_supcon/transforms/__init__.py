"""Two differently augmented views of one patch, and which voxel of one is which voxel of the other."""

from ._foreground import ForegroundIndexd
from ._policies import (
    crop_resize_view,
    identity_view,
    randaugment_view,
    simclr_view,
    standard_view,
)
from ._two_views import TwoViewsd

__all__ = [
    "ForegroundIndexd",
    "TwoViewsd",
    "crop_resize_view",
    "identity_view",
    "randaugment_view",
    "simclr_view",
    "standard_view",
]
