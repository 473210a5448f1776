"""The contrastive loss, voxel sampling, the memory bank, and Dice with contrast. Needs torch only."""

from medseg_supcon.losses._bank import MemoryBank
from medseg_supcon.losses._class_weights import balanced_class_weights
from medseg_supcon.losses._combined import DiceSupConLoss
from medseg_supcon.losses._labels import IGNORE_INDEX
from medseg_supcon.losses._sampler import VoxelSample, VoxelSampler
from medseg_supcon.losses._supcon import SupConLoss
from medseg_supcon.losses._voxel import VoxelSupConLoss

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
