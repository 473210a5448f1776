"""Which voxel of view 2 is which voxel of view 1, from where each view's voxels lie in the scan."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from monai.transforms import Compose, Identityd, InvertibleTransform, RandAffined
from scipy.spatial import cKDTree

# MONAI's packages of transforms that move voxels; everything else of MONAI's leaves them where they are
_SPATIAL_PACKAGES = (
    "monai.transforms.spatial",
    "monai.transforms.croppad",
    "monai.transforms.smooth_field",
)


def leaves(policy: Any) -> Iterator[Any]:
    """The transforms of a policy, those in nested Compose, OneOf, SomeOf and RandomOrder included."""
    if isinstance(policy, Compose):
        for transform in policy.transforms:
            yield from leaves(transform)
    else:
        yield policy


def moves_voxels(transform: Any, label_key: str) -> bool:
    """Whether a transform may change where voxels lie.

    What does not touch the label map cannot, or image and label would part. Of the rest, MONAI's spatial and
    cropping transforms do; a transform of anybody else's is taken to, because nothing says that it does not.
    """
    keys = getattr(transform, "keys", None)
    if keys is not None and label_key not in keys:
        return False
    module = type(transform).__module__
    return not module.startswith("monai.") or module.startswith(_SPATIAL_PACKAGES)


def is_tracked(transform: Any) -> bool:
    """Whether the transform writes what it does into the MetaTensor's affine."""
    if isinstance(transform, RandAffined) and transform.prob < 1:
        # where chance leaves it only the crop to spatial_size, MONAI 1.6 records an earlier draw's affine
        return transform.rand_affine.spatial_size is None
    return type(transform).__module__.startswith("monai.") and isinstance(transform, InvertibleTransform)


def has_untracked(policy: Any, label_key: str) -> bool:
    """Whether the affine is not enough to tell where a view's voxels came from (elastic, grid distortion)."""
    return any(moves_voxels(leaf, label_key) and not is_tracked(leaf) for leaf in leaves(policy))


def geometry_only(policy: Any, label_key: str) -> Any:
    """A copy of a policy that only moves voxels: the same draws under the same seed, intensities untouched.

    Each transform owns its random state, so that an identity in the place of an intensity transform changes
    no other transform's draws.
    """
    clone = copy.deepcopy(policy)
    return _without_intensity(clone, label_key)


def _without_intensity(policy: Any, label_key: str) -> Any:
    if isinstance(policy, Compose):
        policy.transforms = [_without_intensity(transform, label_key) for transform in policy.transforms]
        return policy
    return policy if moves_voxels(policy, label_key) else Identityd(label_key)


NO_PAIR = -1


@dataclass(frozen=True)
class ViewGeometry:
    """Where a view's voxels lie in the scan.

    Attributes:
        to_scan: (4, 4) float64, view voxel -> scan voxel, all of the map where ``positions`` is None.
        positions: (3, *patch) float64 scan voxel coordinates of every view voxel, for a view bent by a
            transform that no affine describes; NaN where the view left the box that it was cut from.
        inside: (*patch) bool, the voxel shows the scan and not padding.
    """

    to_scan: torch.Tensor
    positions: torch.Tensor | None
    inside: torch.Tensor


def voxel_grid(shape: Sequence[int], matrix: torch.Tensor) -> torch.Tensor:
    """``matrix`` applied to every voxel index of ``shape``: (rank, *shape) float64."""
    rank = len(shape)
    out = matrix[:rank, rank].reshape(-1, *[1] * rank)
    for axis, length in enumerate(shape):
        line = torch.arange(length, dtype=torch.float64).reshape(
            [-1 if a == axis else 1 for a in range(rank)]
        )
        out = out + matrix[:rank, axis].reshape(-1, *[1] * rank) * line
    return out


def within(positions: torch.Tensor, low: Sequence[float], high: Sequence[float]) -> torch.Tensor:
    """Which of the (rank, *shape) positions lie in the voxels ``low .. high`` (first and last, inclusive)."""
    keep = torch.ones(positions.shape[1:], dtype=torch.bool)
    for position, first, last in zip(positions, low, high, strict=True):
        keep &= (position >= first - 0.5) & (position < last + 0.5)
    return keep


def pair_ids(view_1: ViewGeometry, view_2: ViewGeometry) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids of one physical voxel in both views.

    View 1's id is the voxel's linear index; view 2's is that of the view-1 voxel whose centre is nearest.
    -1: padding, or (view 2) a place that view 1 does not show. Both (*patch) int64.
    """
    shape = view_1.inside.shape
    ids_1 = torch.arange(view_1.inside.numel()).reshape(shape).masked_fill(~view_1.inside, NO_PAIR)
    if view_1.positions is None:
        nearest = _nearest_straight(view_1, view_2)
    else:
        nearest = _nearest_bent(view_1.positions, view_2)
    found = view_2.inside & (nearest >= 0)
    return ids_1, torch.where(found, ids_1.reshape(-1)[nearest.clamp(min=0)], NO_PAIR)


def _nearest_straight(view_1: ViewGeometry, view_2: ViewGeometry) -> torch.Tensor:
    """Linear index of the view-1 voxel in which each voxel of view 2 lies, -1 outside: by rounding."""
    shape = view_1.inside.shape
    from_scan = torch.linalg.inv(view_1.to_scan)
    if view_2.positions is None:
        seat = voxel_grid(shape, from_scan @ view_2.to_scan)
    else:
        rank = len(shape)
        linear = from_scan[:rank, :rank] @ view_2.positions.reshape(rank, -1)
        seat = (linear + from_scan[:rank, rank:]).reshape(view_2.positions.shape)
    index = torch.zeros(shape, dtype=torch.int64)
    for axis, length in enumerate(shape):
        index = index * length + (seat[axis] + 0.5).floor().nan_to_num(0).long().clamp(0, length - 1)
    shown = within(seat, [0.0] * len(shape), [length - 1.0 for length in shape])
    return index.masked_fill(~shown, NO_PAIR)


def _nearest_bent(positions: torch.Tensor, view_2: ViewGeometry) -> torch.Tensor:
    """As :func:`_nearest_straight` for a bent view 1: by search, in units of its voxels (best affine).

    Outside is what lies more than half a voxel diagonal from every centre.
    """
    rank, shape = positions.shape[0], positions.shape[1:]
    targets = view_2.positions
    if targets is None:
        targets = voxel_grid(shape, view_2.to_scan)
    known = ~positions.isnan().any(dim=0)
    nearest = torch.full(shape, NO_PAIR)
    asked = view_2.inside & ~targets.isnan().any(dim=0)
    if int(known.sum()) <= rank or not bool(asked.any()):
        return nearest
    index = torch.nonzero(known)
    design = torch.cat([index.double(), torch.ones(len(index), 1, dtype=torch.float64)], dim=1)
    # scan voxels -> view-1 voxels; every 7th point fixes an affine well enough
    fit = torch.linalg.lstsq(design[::7], positions[:, known].T[::7]).solution[:rank]
    unit = torch.linalg.pinv(fit)
    tree = cKDTree((positions[:, known].T @ unit).numpy())
    reach = math.sqrt(rank) / 2
    _, found = tree.query((targets[:, asked].T @ unit).numpy(), distance_upper_bound=reach)
    linear = torch.cat([torch.nonzero(known.reshape(-1)).squeeze(1), torch.tensor([NO_PAIR])])
    # the search gives the number of points where it found none, which is the place of the -1
    nearest[asked] = linear[torch.from_numpy(found)]
    return nearest
