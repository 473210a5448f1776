"""What a view policy does to geometry: which transforms move voxels, and which say so in the affine."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

from monai.transforms import Compose, Identityd, InvertibleTransform, RandAffined

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
