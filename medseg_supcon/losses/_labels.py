"""The label that means "nobody annotated this voxel", and label maps brought to one form."""

from __future__ import annotations

import torch
from torch import Tensor

IGNORE_INDEX = -1
"""Class index of a voxel that nobody labelled, or that lies outside the scan (padding)."""


def class_indices(labels: Tensor) -> Tensor:
    """Label maps as class indices, without the channel axis.

    Args:
        labels: (B, 1, *spatial) class indices of any real dtype, or (B, C, *spatial) one-hot; a voxel
            whose one-hot vector is all zero is unlabelled.

    Returns:
        (B, *spatial) int64, unlabelled voxels `IGNORE_INDEX`.

    Raises:
        ValueError: fewer than three axes, no channel, or values that are not whole numbers.

    Example:
        >>> class_indices(torch.tensor([[[0.0, 1.0, 0.0]], [[1.0, 0.0, 0.0]]]).movedim(0, 1)).tolist()
        [[1, 0, -1]]
    """
    if labels.ndim < 3 or labels.shape[1] == 0:
        raise ValueError(
            f"labels must be (B, 1, *spatial) or (B, C, *spatial), got shape {tuple(labels.shape)}"
        )
    if labels.shape[1] != 1:
        one_hot = labels > 0.5
        return one_hot.to(torch.uint8).argmax(1).masked_fill_(~one_hot.any(1), IGNORE_INDEX)
    indices = labels[:, 0]
    if not indices.is_floating_point():
        return indices.long()
    whole = indices.long()
    if not torch.equal(whole.to(indices.dtype), indices):
        wrong = indices[whole.to(indices.dtype) != indices][0].item()
        raise ValueError(
            f"labels must be whole numbers (class indices), got {wrong}; were they interpolated linearly?"
        )
    return whole
