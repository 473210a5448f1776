"""The contrastive loss, voxel sampling, the memory bank, and Dice with contrast. Needs torch only."""

from medseg_supcon.losses.bank import MemoryBank
from medseg_supcon.losses.sampler import VoxelSample, VoxelSampler
from medseg_supcon.losses.supcon import SupConLoss, balanced_class_weights
from medseg_supcon.losses.voxel import IGNORE_INDEX, DiceSupConLoss, VoxelSupConLoss
