"""Which voxel of view 2 is which voxel of view 1: from the affines of the views, and only if those tell."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from monai.transforms import Compose, InvertibleTransform, RandAffined

NO_PAIR = -1
# MONAI's packages of transforms that move voxels; its other transforms leave them where they are
SPATIAL_PACKAGES = ("monai.transforms.spatial", "monai.transforms.croppad", "monai.transforms.smooth_field")


def leaves(policy: Any) -> Iterator[Any]:
    """The transforms of a policy, including those in nested Compose, OneOf, SomeOf and RandomOrder."""
    if isinstance(policy, Compose):
        for transform in policy.transforms:
            yield from leaves(transform)
    else:
        yield policy


def moves_voxels(transform: Any, label_key: str) -> bool:
    """Whether a transform may change where voxels are.

    A transform that leaves the label map alone cannot, or image and label would no longer match. Of the others,
    MONAI's spatial and cropping transforms do, and so may every transform that is not MONAI's.
    """
    keys = getattr(transform, "keys", None)
    if keys is not None and label_key not in keys:
        return False
    module = type(transform).__module__
    return not module.startswith("monai.") or module.startswith(SPATIAL_PACKAGES)


def is_tracked(transform: Any) -> bool:
    """Whether the transform writes what it does into the MetaTensor's affine."""
    if isinstance(transform, RandAffined) and transform.prob < 1:
        # if chance leaves only the crop to spatial_size, MONAI 1.6 records an earlier draw's affine
        return transform.rand_affine.spatial_size is None
    return type(transform).__module__.startswith("monai.") and isinstance(transform, InvertibleTransform)


def has_untracked(policy: Any, label_key: str) -> bool:
    """Whether the affine does not tell where a view's voxels come from (elastic, grid distortion)."""
    return any(moves_voxels(leaf, label_key) and not is_tracked(leaf) for leaf in leaves(policy))


def voxel_grid(shape: Sequence[int], matrix: torch.Tensor) -> torch.Tensor:
    """``matrix`` applied to every voxel index of ``shape``: (rank, *shape) float64."""
    rank = len(shape)
    out = matrix[:rank, rank].reshape(-1, *[1] * rank)
    for axis, length in enumerate(shape):
        line = torch.arange(length, dtype=torch.float64).reshape([-1 if a == axis else 1 for a in range(rank)])
        out = out + matrix[:rank, axis].reshape(-1, *[1] * rank) * line
    return out


def within(positions: torch.Tensor, low: Sequence[float], high: Sequence[float]) -> torch.Tensor:
    """Which of the (rank, *shape) positions are in the voxels ``low .. high`` (first and last, inclusive)."""
    keep = torch.ones(positions.shape[1:], dtype=torch.bool)
    for position, first, last in zip(positions, low, high, strict=True):
        keep &= (position >= first - 0.5) & (position < last + 0.5)
    return keep


def pair_ids(to_scan: Sequence[torch.Tensor], inside: Sequence[torch.Tensor]) -> torch.Tensor:
    """Ids of one physical voxel in both views, (2, *patch) int64.

    Args:
        to_scan: of each view, (4, 4) float64: view voxel -> scan voxel.
        inside: of each view, (*patch) bool: the voxel shows the scan and not padding.

    Returns:
        in view 1 a voxel's linear index, in view 2 that of the view-1 voxel that contains its centre; -1 for padding,
        and in view 2 for a place that view 1 does not show.
    """
    shape = inside[0].shape
    ids_1 = torch.arange(inside[0].numel()).reshape(shape).masked_fill(~inside[0], NO_PAIR)
    place = voxel_grid(shape, torch.linalg.inv(to_scan[0]) @ to_scan[1])
    index = torch.zeros(shape, dtype=torch.int64)
    for axis, length in enumerate(shape):
        index = index * length + (place[axis] + 0.5).floor().long().clamp(0, length - 1)
    paired = inside[1] & within(place, [0.0] * len(shape), [length - 1.0 for length in shape])
    return torch.stack((ids_1, torch.where(paired, ids_1.reshape(-1)[index], NO_PAIR)))
