"""The label of unannotated voxels, label maps as class indices, and class weights from counts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from medseg_supcon.losses.checks import number_vector

IGNORE_INDEX = -1
"""Class index of a voxel that nobody labelled, or that is outside the scan (padding)."""


def class_indices(labels: Tensor) -> Tensor:
    """(B, *spatial) int64 of class indices (B, 1, *spatial) or one-hot (B, C, *spatial); unlabelled `IGNORE_INDEX`.

    Example:
        >>> class_indices(torch.tensor([[[0.0, 1.0, 0.0]], [[1.0, 0.0, 0.0]]]).movedim(0, 1)).tolist()
        [[1, 0, -1]]
    """
    if labels.ndim < 3 or labels.shape[1] == 0:
        raise ValueError(f"labels must be (B, 1, *spatial) or (B, C, *spatial), got shape {tuple(labels.shape)}")
    if labels.shape[1] != 1:
        one_hot = labels > 0.5
        return one_hot.to(torch.uint8).argmax(1).masked_fill_(~one_hot.any(1), IGNORE_INDEX)
    indices = labels[:, 0]
    whole = indices.long()
    if indices.is_floating_point() and not torch.equal(whole.to(indices.dtype), indices):
        wrong = indices[whole.to(indices.dtype) != indices][0].item()
        raise ValueError(f"labels must be whole numbers (class indices), got {wrong}; were they interpolated linearly?")
    return whole


def balanced_class_weights(counts: Tensor | Sequence[float]) -> Tensor:
    """Inverse-frequency class weights, w_c = n / (C n_c), (C,) float64, with 0 for an absent class.

    They suit voxels sampled in proportion to volume. `SupConLoss(class_weights="balanced")` counts the voxels that
    were sampled instead, so it is right for any sampling.

    Args:
        counts: (C,) n_c, voxels per class, or frequencies; n is their sum.

    Raises:
        ValueError, TypeError: not C finite numbers >= 0 with a positive sum.

    Example:
        >>> balanced_class_weights([12, 4, 0, 8]).tolist()
        [0.5, 1.5, 0.0, 0.75]
    """
    n_c = number_vector("counts", counts)
    if not bool(n_c.sum() > 0):
        raise ValueError(f"counts must be finite and >= 0 with a positive sum, got {n_c.tolist()}")
    return torch.where(n_c > 0, n_c.sum() / (len(n_c) * n_c), 0.0)
