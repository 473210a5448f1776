"""Which voxel of view 2 is which voxel of view 1, from the affines of the views if those say it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from monai.data import MetaTensor
from monai.transforms import Compose, InvertibleTransform, RandAffined

from medseg_supcon.views.policies import LABEL

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


def moves_voxels(transform: Any) -> bool:
    """Whether a transform may change where voxels are.

    A transform that leaves the label map alone cannot, or image and label would no longer match. Of the others,
    MONAI's spatial and cropping transforms do, and so may every transform that is not MONAI's.
    """
    module = type(transform).__module__
    may_move = not module.startswith("monai.") or module.startswith(SPATIAL_PACKAGES)
    return may_move and LABEL in getattr(transform, "keys", (LABEL,))


def has_untracked(policy: Any) -> bool:
    """Whether the affine does not say where a view's voxels come from (elastic, grid distortion)."""
    return any(moves_voxels(leaf) and not _is_tracked(leaf) for leaf in leaves(policy))


def _is_tracked(transform: Any) -> bool:
    """Whether the transform writes what it does into the MetaTensor's affine."""
    if isinstance(transform, RandAffined) and transform.prob < 1:
        # if chance leaves only the crop to spatial_size, MONAI 1.6 records an earlier draw's affine
        return transform.rand_affine.spatial_size is None
    return type(transform).__module__.startswith("monai.") and isinstance(transform, InvertibleTransform)


def affine_of(volume: torch.Tensor) -> torch.Tensor:
    """Voxel to world of a (C, *spatial) volume, float64; the identity for a plain tensor."""
    rank = volume.ndim - 1
    if isinstance(volume, MetaTensor):
        return torch.as_tensor(volume.affine).to(torch.float64)[: rank + 1, : rank + 1]
    return torch.eye(rank + 1, dtype=torch.float64)


def voxel_grid(shape: Sequence[int], matrix: torch.Tensor) -> torch.Tensor:
    """``matrix`` applied to every voxel index of ``shape``: (rank, *shape) float64."""
    rank = len(shape)
    columns = matrix[:rank].reshape(rank, rank + 1, *[1] * rank)
    out = columns[:, rank]
    for axis, length in enumerate(shape):
        line = torch.arange(length, dtype=torch.float64).reshape([-1 if a == axis else 1 for a in range(rank)])
        out = out + columns[:, axis] * line
    return out


def within(positions: torch.Tensor, low: Sequence[float], high: Sequence[float]) -> torch.Tensor:
    """Which of the (rank, *shape) positions are in the voxels ``low .. high`` (first and last, inclusive)."""
    keep = torch.ones(positions.shape[1:], dtype=torch.bool)
    for position, first, last in zip(positions, low, high, strict=True):
        keep &= (position >= first - 0.5) & (position < last + 0.5)
    return keep


def pair_ids(to_scan: Sequence[torch.Tensor], inside: Sequence[torch.Tensor]) -> torch.Tensor:
    """Ids of one physical voxel in both views, (2, *patch) int64; ``TwoViewsd`` says what they are.

    Args:
        to_scan: of each view, (4, 4) float64: view voxel -> scan voxel.
        inside: of each view, (*patch) bool: the voxel shows the scan and not padding.
    """
    shape = inside[0].shape
    ids_1 = torch.arange(inside[0].numel()).reshape(shape).masked_fill(~inside[0], NO_PAIR)
    place = voxel_grid(shape, torch.linalg.inv(to_scan[0]) @ to_scan[1])
    index = torch.zeros(shape, dtype=torch.int64)
    for axis, length in enumerate(shape):
        index = index * length + (place[axis] + 0.5).floor().long().clamp(0, length - 1)
    paired = inside[1] & within(place, [0.0] * len(shape), [length - 1.0 for length in shape])
    return torch.stack((ids_1, torch.where(paired, ids_1.reshape(-1)[index], NO_PAIR)))
