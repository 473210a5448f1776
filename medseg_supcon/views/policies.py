"""View policies: MONAI transforms on the keys image and label that turn a box of a scan into the patch at its centre.

All take ``patch_size`` (voxels per axis of the view), ``flip_axes``, ``spacing``, ``bias_field`` and ``scanner_shifts``,
so that a config replaces one by another by its name. Some ignore the last four; their docstrings say so. An argument that
is out of its range is a ValueError.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import monai.transforms as mt

from medseg_supcon.views.intensity import (
    IMAGE,
    BiasFieldd,
    IntensityChanged,
    blur,
    brightness,
    contrast,
    gaussian_noise,
    power,
)
from medseg_supcon.views.intensity import low_resolution as coarse
from medseg_supcon.views.scanner_shifts import ScannerShiftd, Shares, has_ct
from medseg_supcon.views.spatial import KEYS, MODES, AffinePatchd

ANISOTROPY = 3.0  # nnU-Net's threshold, for voxel sizes and for extents: beyond it rotations stay in plane

Spacing = Sequence[float] | None


def usual_bias_field(channels: Sequence[str]) -> float:
    """The share of patches with a bias field: 0 if a channel is CT, else 0.3.

    >>> usual_bias_field(["T1", "T2"]), usual_bias_field([" ct"])
    (0.3, 0.0)
    """
    return 0.0 if has_ct(channels) else 0.3


def standard_view(
    patch_size: Sequence[int], *, flip_axes: Sequence[int] = (), rotation_degrees: float = 30.0,
    scale: tuple[float, float] = (0.7, 1.4), affine_probability: float = 0.2, strength: float = 1.0,
    spacing: Spacing = None, elastic: float = 0.0, low_resolution: float = 0.25, bias_field: float = 0.0,
    scanner_shifts: Shares | None = None,
) -> mt.Compose:  # fmt: skip
    """Affine, noise, blur, brightness, contrast, low resolution and gamma at about nnU-Net's strength.

    Rotation, zoom and crop are one resampling (linear for the image, nearest for the label map); mirroring follows and is
    exact. Meant for z-scored intensities. Intensity changes are drawn for all channels together.

    Args:
        flip_axes: spatial axes mirrored, each with probability 0.5; leave out those that tell left from right.
        rotation_degrees: largest angle, both ways, about each axis.
        scale: smallest and largest field of view, as a factor per axis: 1.4 shows 1.4 times as much.
        affine_probability: how often the view is rotated and zoomed at all; 0.2 is nnU-Net's.
        strength: 0 leaves intensities alone, 1 is nnU-Net's ranges; below 2.5.
        spacing: mm per axis; None means isotropic. If one axis is at least 3 times coarser than the finest, rotation
            is only about that axis (in plane). A patch is not rotated if two axes would change places of which one is
            at least 3 times as long (mm), and not zoomed along an axis of one voxel.
        elastic: how often an elastic deformation joins the affine, in the same resampling; its displacements have a
            standard deviation of 0.2 to 1.2 voxels. Above 0, views have no correspondence (see ``TwoViewsd``).
        low_resolution: probability of a simulated low resolution, 0.5 to 1 of the voxels per axis.
        bias_field: probability of a smooth multiplicative field, as the coils of an MR scanner cause it.
        scanner_shifts: kind -> probability; at most one of them is applied to a view, before the other intensity
            changes (``ScannerShiftd``). None, or no probability above 0: none.

    Source:
        Isensee et al. 2021, nnU-Net, Nature Methods 18, supplementary note 4.

    Example:
        >>> box = torch.rand(1, 48, 48, 48)
        >>> standard_view((32, 32, 32))({"image": box, "label": box > 0.5})["image"].shape
        torch.Size([1, 32, 32, 32])
    """
    _check(patch_size, scale, strength, affine_probability=affine_probability, elastic=elastic, bias_field=bias_field)
    axes = _turning_axes(patch_size, spacing)
    affine: dict[str, Any] = {
        "spatial_size": tuple(patch_size),
        "rotate_range": [math.radians(rotation_degrees) if axis in axes else 0.0 for axis in range(3)],
        "scale_range": _zooms(patch_size, scale),
    }
    spatial: Any = AffinePatchd(prob=affine_probability, flip_axes=flip_axes, **affine)
    if elastic > 0:
        # uniform noise smoothed by sigma deviates by 0.087 sigma^-1.5: times the magnitude, 0.2 to 1.2 voxels
        waves: dict[str, Any] = {"sigma_range": (5.0, 7.0), "magnitude_range": (50.0, 150.0)}
        modes = {"mode": tuple(MODES.values()), "padding_mode": "zeros"}
        bent = mt.Rand3DElasticd(KEYS, prob=1.0, **waves, **affine, **modes)
        spatial = mt.OneOf(
            [mt.Compose([bent, AffinePatchd(patch_size, flip_axes=flip_axes)]), spatial], weights=[elastic, 1 - elastic]
        )
    shares = scanner_shifts or {}
    intensity: list[Any] = [ScannerShiftd(shares)] if any(shares.values()) else []
    intensity += [BiasFieldd(bias_field)] if bias_field > 0 else []
    intensity += _intensity(strength, (0.1, 0.2, 0.15, 0.15))
    intensity += [IntensityChanged(low_resolution, coarse, zoom=(0.5, 1.0))] if low_resolution > 0 else []
    return mt.Compose([spatial, *intensity, *_gamma(strength, 0.3)])


def identity_view(
    patch_size: Sequence[int], *, flip_axes: Sequence[int] = (), spacing: Spacing = None, bias_field: float = 0.0,
    scanner_shifts: Shares | None = None,
) -> mt.Compose:  # fmt: skip
    """The patch as it is, without augmentation; all arguments but ``patch_size`` are ignored."""
    return mt.Compose([AffinePatchd(patch_size)])


def crop_resize_view(
    patch_size: Sequence[int], *, scale: tuple[float, float] = (0.5, 1.0), flip_axes: Sequence[int] = (),
    spacing: Spacing = None, bias_field: float = 0.0, scanner_shifts: Shares | None = None,
) -> mt.Compose:  # fmt: skip
    """A random part of the patch, resized to the patch: the source article's first view (after SimCLR).

    The part's extent is drawn per axis; its centre moves so far that the smallest part stays in the patch.
    Cut and resize are one resampling. ``spacing``, ``bias_field`` and ``scanner_shifts`` are ignored.

    Args:
        scale: smallest and largest extent of the part, as a fraction of the patch, per axis.
        flip_axes: spatial axes mirrored, each with probability 0.5.

    Source:
        Chen et al. 2020, SimCLR, appendix A (random crop and resize).
    """
    _check(patch_size, scale)
    shift = [length * (1 - scale[0]) / 2 if length > 1 else 0.0 for length in patch_size]
    zooms = _zooms(patch_size, scale)
    return mt.Compose([AffinePatchd(patch_size, 1.0, translate_range=shift, scale_range=zooms, flip_axes=flip_axes)])


def simclr_view(
    patch_size: Sequence[int], *, strength: float = 1.0, flip_axes: Sequence[int] = (), spacing: Spacing = None,
    bias_field: float = 0.0, scanner_shifts: Shares | None = None,
) -> mt.Compose:  # fmt: skip
    """Strong intensity changes and no geometry: SimCLR's colour jitter and blur, for scans.

    ``flip_axes``, ``spacing``, ``bias_field`` and ``scanner_shifts`` are ignored; bias fields are among the changes.

    Args:
        strength: 0 leaves intensities alone; below 1.25.

    Source:
        Chen et al. 2020, SimCLR: jitter with probability 0.8 and strength 0.8, blur with probability 0.5.
    """
    _check(patch_size, strength=2 * strength)
    field = mt.RandBiasFieldd(IMAGE, prob=0.5 if strength > 0 else 0.0, coeff_range=(0.0, 0.2 * strength))
    intensity = [*_intensity(2 * strength, (0.5, 0.5, 0.8, 0.8)), field, *_gamma(strength, 0.8)]
    return mt.Compose([*identity_view(patch_size).transforms, *intensity])


def randaugment_view(
    patch_size: Sequence[int], *, num_ops: int = 2, magnitude: float = 0.5, flip_axes: Sequence[int] = (),
    spacing: Spacing = None, bias_field: float = 0.0, scanner_shifts: Shares | None = None,
) -> mt.Compose:  # fmt: skip
    """``num_ops`` intensity operations, drawn for each view out of nine: RandAugment for scans.

    ``flip_axes``, ``spacing``, ``bias_field`` and ``scanner_shifts`` are ignored; bias fields are among the operations.

    Args:
        num_ops: operations per view, 1 to 9.
        magnitude: 0 (nothing) to 1 (strongest), shared by all operations, as in the article.

    Source:
        Cubuk et al. 2020, RandAugment, with its colour operations replaced by those of MR and CT.
    """
    if not 0 <= magnitude <= 1:
        raise ValueError(f"magnitude must be between 0 and 1, got {magnitude}.")
    m, sigma = magnitude, (0.0, 0.1 + 1.4 * magnitude)
    pool: list[Any] = [
        mt.RandGaussianNoised(IMAGE, prob=1.0, std=0.4 * m),
        mt.RandGaussianSmoothd(IMAGE, prob=1.0, sigma_x=sigma, sigma_y=sigma, sigma_z=sigma),
        mt.RandGaussianSharpend(IMAGE, prob=1.0, alpha=(0.0, 10.0 * m)),
        mt.RandScaleIntensityd(IMAGE, prob=1.0, factors=0.5 * m),
        mt.RandShiftIntensityd(IMAGE, prob=1.0, offsets=0.5 * m),
        mt.RandScaleIntensityFixedMeand(IMAGE, prob=1.0, factors=0.7 * m),
        mt.RandAdjustContrastd(IMAGE, prob=1.0, gamma=(1 - 0.5 * m, 1 + m), retain_stats=True),
        mt.RandBiasFieldd(IMAGE, prob=1.0, coeff_range=(0.0, 0.3 * m)),
        mt.RandSimulateLowResolutiond(IMAGE, prob=1.0, zoom_range=(1 - 0.6 * m, 1.0), downsample_mode="area"),
    ]
    if not 1 <= num_ops <= len(pool):
        raise ValueError(f"num_ops must be from 1 to {len(pool)}, got {num_ops}.")
    return mt.Compose([*identity_view(patch_size).transforms, mt.SomeOf(pool, num_transforms=num_ops)])


def _check(
    patch_size: Sequence[int], scale: tuple[float, float] = (1.0, 1.0), strength: float = 1.0, **probabilities: float
) -> None:
    if len(patch_size) != 3 or any(length < 1 for length in patch_size):
        raise ValueError(f"patch_size must be 3 positive voxel counts, got {tuple(patch_size)}.")
    if not 0 < scale[0] <= scale[1]:
        raise ValueError(f"scale must be (low, high) with 0 < low <= high, got {scale}.")
    if not 0 <= strength < 2.5:
        raise ValueError(f"strength is out of range, got {strength}: a factor of 0.25 x strength must stay below 1.")
    for name, value in probabilities.items():
        if not 0 <= value <= 1:
            raise ValueError(f"{name} is a probability, got {value}.")


def _turning_axes(patch_size: Sequence[int], spacing: Spacing) -> list[int]:
    """The axes to rotate a patch about, so that no axis turns into one that is much coarser, longer or shorter."""
    voxel = [1.0] * 3 if spacing is None else list(spacing)
    extent = [length * mm for length, mm in zip(patch_size, voxel, strict=True)]
    axes = [voxel.index(max(voxel))] if max(voxel) / min(voxel) >= ANISOTROPY else list(range(3))
    others = {axis: extent[:axis] + extent[axis + 1 :] for axis in axes}
    return [axis for axis in axes if max(others[axis]) / min(others[axis]) < ANISOTROPY]


def _zooms(patch_size: Sequence[int], scale: tuple[float, float]) -> list[tuple[float, float]]:
    """MONAI's ``scale_range``: none along an axis of one voxel, which has no neighbours to show."""
    return [(scale[0] - 1, scale[1] - 1) if length > 1 else (0.0, 0.0) for length in patch_size]


def _intensity(strength: float, probabilities: tuple[float, float, float, float]) -> list[Any]:
    """Noise, blur, brightness and contrast."""
    noise, smooth, bright, contrasted = probabilities
    transforms = [
        IntensityChanged(noise, gaussian_noise, std=0.3 * strength),
        IntensityChanged(smooth, blur, sigma=(0.5 * strength, 1.0 * strength)),
        IntensityChanged(bright, brightness, factor=0.25 * strength),
        IntensityChanged(contrasted, contrast, factor=0.25 * strength),
    ]
    return transforms if strength > 0 else []


def _gamma(strength: float, probability: float) -> list[Any]:
    """Gamma with mean and deviation kept, of the negative image and of the image."""
    span = (1 - 0.3 * min(strength, 2.0), 1 + 0.5 * strength)
    negative = IntensityChanged(0.1, power, gamma=span, negative=True)
    return [negative, IntensityChanged(probability, power, gamma=span)] if strength > 0 else []
