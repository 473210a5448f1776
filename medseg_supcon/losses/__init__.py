"""The contrastive loss, voxel sampling, the memory bank, and Dice with contrast. Needs torch only."""

from ._bank import MemoryBank
from ._class_weights import balanced_class_weights
from ._combined import DiceSupConLoss
from ._labels import IGNORE_INDEX
from ._sampler import VoxelSample, VoxelSampler
from ._supcon import SupConLoss
from ._voxel import VoxelSupConLoss

__all__ = [
    "IGNORE_INDEX",
    "DiceSupConLoss",
    "MemoryBank",
    "SupConLoss",
    "VoxelSample",
    "VoxelSampler",
    "VoxelSupConLoss",
    "balanced_class_weights",
]
