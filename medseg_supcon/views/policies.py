"""View policies: MONAI transforms on the keys image and label that make one view of a patch.

All take ``patch_size`` (voxels per axis of the view), ``flip_axes``, ``spacing``, ``bias_field`` and ``keys`` (of the
image and the label map), so that a config replaces one by another by its name. Some ignore ``flip_axes``, ``spacing`` or
``bias_field``; their docstrings say so.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import monai.transforms as mt

from medseg_supcon.views.augmentations import (
    Keys,
    affine,
    check,
    flips,
    gamma,
    intensity,
    shading,
    simulated_low_resolution,
    zooms,
)

KEYS: Keys = ("image", "label")


def usual_bias_field(channels: Sequence[str]) -> float:
    """The share of patches with a bias field: 0 if a channel is CT, else 0.3.

    >>> usual_bias_field(["T1", "T2"]), usual_bias_field([" ct"])
    (0.3, 0.0)
    """
    return 0.0 if "ct" in (name.strip().lower() for name in channels) else 0.3


def standard_view(
    patch_size: Sequence[int],
    *,
    flip_axes: Sequence[int] = (),
    rotation_degrees: float = 30.0,
    scale: tuple[float, float] = (0.7, 1.4),
    affine_probability: float = 0.9,
    strength: float = 1.0,
    spacing: Sequence[float] | None = None,
    elastic: float = 0.0,
    low_resolution: float = 0.25,
    bias_field: float = 0.0,
    keys: Keys = KEYS,
) -> mt.Compose:
    """Affine, noise, blur, brightness, contrast, low resolution and gamma at about nnU-Net's strength.

    Rotation, zoom and crop are one resampling (linear for the image, nearest for the label map); mirroring
    follows and is exact. Meant for z-scored intensities. Blur, noise, brightness and contrast are drawn
    for all channels together; gamma takes its range over all channels.

    Args:
        patch_size: voxels per axis of the view.
        flip_axes: spatial axes mirrored, each with probability 0.5; leave out those that tell left from right.
        rotation_degrees: largest angle, both ways, about each axis.
        scale: smallest and largest field of view, as a factor per axis: 1.4 shows 1.4 times as much.
        affine_probability: how often the view is rotated and zoomed at all.
        strength: 0 leaves intensities alone, 1 is nnU-Net's ranges; below 2.5.
        spacing: mm per axis; None means isotropic. If one axis is at least 3 times coarser than the finest, rotation
            is only about that axis (in plane). A patch is not rotated if two axes would change places of which one is
            at least 3 times as long (mm), and not zoomed along an axis of one voxel.
        elastic: how often an elastic deformation joins the affine, in the same resampling; its displacements have a
            standard deviation of 0.2 to 1.2 voxels. Above 0, views have no correspondence (see ``TwoViewsd``).
        low_resolution: probability of a simulated low resolution, 0.5 to 1 of the voxels per axis.
        bias_field: probability of a smooth multiplicative field, as the coils of an MR scanner cause it.

    Returns:
        A Compose that takes a box at least as large as the patch and returns the patch at its centre.

    Raises:
        ValueError: an argument is out of its range.

    Source:
        Isensee et al. 2021, nnU-Net, Nature Methods 18, supplementary note 4.

    Example:
        >>> box = torch.rand(1, 48, 48, 48)
        >>> standard_view((32, 32, 32))({"image": box, "label": box > 0.5})["image"].shape
        torch.Size([1, 32, 32, 32])
    """
    check(patch_size, scale, strength)
    image = keys[0]
    return mt.Compose(
        [
            affine(patch_size, keys, rotation_degrees, scale, spacing, affine_probability, elastic),
            *flips(flip_axes, keys),
            *shading(image, bias_field),
            *intensity(image, strength, (0.1, 0.2, 0.15, 0.15)),
            *(simulated_low_resolution(image, low_resolution) if low_resolution > 0 else []),
            *gamma(image, strength, 0.3),
        ]
    )


def identity_view(
    patch_size: Sequence[int],
    *,
    flip_axes: Sequence[int] = (),
    spacing: Sequence[float] | None = None,
    bias_field: float = 0.0,
    keys: Keys = KEYS,
) -> mt.Compose:
    """The patch as it is, without augmentation; ``flip_axes``, ``spacing`` and ``bias_field`` are ignored."""
    return mt.Compose([mt.CenterSpatialCropd(keys, roi_size=tuple(patch_size))])


def crop_resize_view(
    patch_size: Sequence[int],
    *,
    scale: tuple[float, float] = (0.5, 1.0),
    flip_axes: Sequence[int] = (),
    spacing: Sequence[float] | None = None,
    bias_field: float = 0.0,
    keys: Keys = KEYS,
) -> mt.Compose:
    """A random part of the patch, resized to the patch: the source article's first view (after SimCLR).

    The part's extent is drawn per axis; its centre moves so far that the smallest part stays in the patch.
    Cut and resize are one resampling. ``spacing`` and ``bias_field`` are ignored.

    Args:
        scale: smallest and largest extent of the part, as a fraction of the patch, per axis.
        flip_axes: spatial axes mirrored, each with probability 0.5.

    Source:
        Chen et al. 2020, SimCLR, appendix A (random crop and resize).
    """
    check(patch_size, scale, 1.0)
    shift = [length * (1 - scale[0]) / 2 if length > 1 else 0.0 for length in patch_size]
    resize = mt.RandAffined(
        keys,
        spatial_size=tuple(patch_size),
        prob=1.0,
        translate_range=shift,
        scale_range=zooms(patch_size, scale),
        mode=("bilinear", "nearest"),
        padding_mode="zeros",
    )
    return mt.Compose([resize, *flips(flip_axes, keys)])


def simclr_view(
    patch_size: Sequence[int],
    *,
    strength: float = 1.0,
    flip_axes: Sequence[int] = (),
    spacing: Sequence[float] | None = None,
    bias_field: float = 0.0,
    keys: Keys = KEYS,
) -> mt.Compose:
    """Strong intensity changes and no geometry: SimCLR's colour jitter and blur, for scans.

    ``flip_axes``, ``spacing`` and ``bias_field`` are ignored; bias fields are among the changes.

    Args:
        strength: 0 leaves intensities alone; below 1.25.

    Source:
        Chen et al. 2020, SimCLR: jitter with probability 0.8 and strength 0.8, blur with probability 0.5.
    """
    check(patch_size, (1.0, 1.0), 2 * strength)
    return mt.Compose(
        [
            *identity_view(patch_size, keys=keys).transforms,
            *intensity(keys[0], 2 * strength, (0.5, 0.5, 0.8, 0.8)),
            mt.RandBiasFieldd(keys[0], prob=0.5 if strength > 0 else 0.0, coeff_range=(0.0, 0.2 * strength)),
            *gamma(keys[0], strength, 0.8),
        ]
    )


def randaugment_view(
    patch_size: Sequence[int],
    *,
    num_ops: int = 2,
    magnitude: float = 0.5,
    flip_axes: Sequence[int] = (),
    spacing: Sequence[float] | None = None,
    bias_field: float = 0.0,
    keys: Keys = KEYS,
) -> mt.Compose:
    """``num_ops`` intensity operations, drawn anew for each view out of nine: RandAugment for scans.

    ``flip_axes``, ``spacing`` and ``bias_field`` are ignored; bias fields are among the operations.

    Args:
        num_ops: operations per view, 1 to 9.
        magnitude: 0 (nothing) to 1 (strongest), shared by all operations, as in the article.

    Raises:
        ValueError: ``num_ops`` or ``magnitude`` is out of range.

    Source:
        Cubuk et al. 2020, RandAugment, with its colour operations replaced by those of MR and CT.
    """
    if not 0 <= magnitude <= 1:
        raise ValueError(f"magnitude must be between 0 and 1, got {magnitude}.")
    image, m = keys[0], magnitude
    sigma = (0.0, 0.1 + 1.4 * m)
    pool: list[Any] = [
        mt.RandGaussianNoised(image, prob=1.0, std=0.4 * m),
        mt.RandGaussianSmoothd(image, prob=1.0, sigma_x=sigma, sigma_y=sigma, sigma_z=sigma),
        mt.RandGaussianSharpend(image, prob=1.0, alpha=(0.0, 10.0 * m)),
        mt.RandScaleIntensityd(image, prob=1.0, factors=0.5 * m),
        mt.RandShiftIntensityd(image, prob=1.0, offsets=0.5 * m),
        mt.RandScaleIntensityFixedMeand(image, prob=1.0, factors=0.7 * m),
        mt.RandAdjustContrastd(image, prob=1.0, gamma=(1 - 0.5 * m, 1 + m), retain_stats=True),
        mt.RandBiasFieldd(image, prob=1.0, coeff_range=(0.0, 0.3 * m)),
        mt.RandSimulateLowResolutiond(image, prob=1.0, zoom_range=(1 - 0.6 * m, 1.0), downsample_mode="area"),
    ]
    if not 1 <= num_ops <= len(pool):
        raise ValueError(f"num_ops must be from 1 to {len(pool)}, got {num_ops}.")
    chosen = mt.SomeOf(pool, num_transforms=num_ops)
    return mt.Compose([*identity_view(patch_size, keys=keys).transforms, chosen])
