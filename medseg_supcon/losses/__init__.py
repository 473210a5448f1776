"""The contrastive loss, voxel sampling, the memory bank, and Dice with contrast. Needs torch only."""

from medseg_supcon.losses.bank import MemoryBank
from medseg_supcon.losses.combined import DiceSupConLoss
from medseg_supcon.losses.labels import IGNORE_INDEX, balanced_class_weights
from medseg_supcon.losses.sampler import VoxelSample, VoxelSampler
from medseg_supcon.losses.supcon import SupConLoss
from medseg_supcon.losses.voxel import VoxelSupConLoss
