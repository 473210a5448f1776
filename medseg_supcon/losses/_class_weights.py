"""Class weights that give every class the same say."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from medseg_supcon.losses._checks import number_vector


def balanced_class_weights(counts: Tensor | Sequence[float]) -> Tensor:
    """Inverse-frequency class weights, w_c = n / (C n_c), with 0 for an absent class.

    Here n_c is the number of voxels of class c, n their sum and C the number of classes, absent ones
    included. Weighted by w, every class that occurs contributes n / C, whatever its volume.

    Stratified sampling (`VoxelSampler(strategy="stratified")`) balances the classes already. With these
    weights on top the correction is made twice, and rare classes dominate: use one or the other.

    Args:
        counts: (C,) voxels per class, or frequencies; only their ratios matter.

    Returns:
        (C,) float64 weights.

    Raises:
        ValueError: not one-dimensional, negative or not finite, or nothing but zeros.
        TypeError: not numbers.

    Example:
        >>> balanced_class_weights([12, 4, 0, 8]).tolist()
        [0.5, 1.5, 0.0, 0.75]
    """
    n_c = number_vector("counts", counts)
    if not bool(torch.isfinite(n_c).all()) or bool((n_c < 0).any()) or not bool(n_c.sum() > 0):
        raise ValueError(f"counts must be finite and >= 0 with a positive sum, got {n_c.tolist()}")
    weights = n_c.sum() / (n_c.numel() * n_c)
    return torch.where(n_c > 0, weights, torch.zeros_like(weights))
