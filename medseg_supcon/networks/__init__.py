"""Dense features out of stock networks, a projection head, and what a network asks of the patch size."""

from ._build import build_network
from ._contrastive import ContrastiveNetwork
from ._divisor import round_patch, size_divisor
from ._projection import ProjectionHead
from ._tap import FeatureTap

__all__ = [
    "ContrastiveNetwork",
    "FeatureTap",
    "ProjectionHead",
    "build_network",
    "round_patch",
    "size_divisor",
]
