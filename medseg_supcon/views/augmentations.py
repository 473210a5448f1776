"""The building blocks of the view policies: one resampling, exact flips, intensities in nnU-Net's ranges."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import monai.transforms as mt
import numpy as np

# nnU-Net's threshold: slices this many times thicker than the pixels, and slabs this many times thinner than
# they are wide, are rotated in plane only
ANISOTROPY = 3.0
Keys = tuple[str, str]


def check(patch_size: Sequence[int], scale: tuple[float, float], strength: float) -> None:
    """Raise ValueError for arguments out of range."""
    if len(patch_size) not in (2, 3) or any(length < 1 for length in patch_size):
        raise ValueError(f"patch_size must be 2 or 3 positive voxel counts, got {tuple(patch_size)}.")
    if not 0 < scale[0] <= scale[1]:
        raise ValueError(f"scale must be (low, high) with 0 < low <= high, got {scale}.")
    if not 0 <= strength < 2.5:
        raise ValueError(f"strength is out of range, got {strength}: a factor of 0.25 x strength must stay below 1.")


def turning_axes(patch_size: Sequence[int], spacing: Sequence[float] | None) -> list[int]:
    """The axes to rotate a patch about; 2 is the one of 2-D.

    Only the coarsest axis if voxels are anisotropic, and none whose two others differ so much in extent that the
    patch would be rotated out of itself (a thin scan has nothing there).
    """
    rank = len(patch_size)
    voxel = [1.0] * rank if spacing is None else list(spacing)
    extent = [length * mm for length, mm in zip(patch_size, voxel, strict=True)]
    axes = list(range(3))
    if rank == 3 and max(voxel) / min(voxel) >= ANISOTROPY:
        axes = [voxel.index(max(voxel))]
    others = {axis: [mm for other, mm in enumerate(extent) if other != axis] for axis in axes}
    return [axis for axis in axes if max(others[axis]) / min(others[axis]) < ANISOTROPY]


def zooms(patch_size: Sequence[int], scale: tuple[float, float]) -> list[tuple[float, float]]:
    """MONAI's ``scale_range``: none along an axis of one voxel, which has no neighbours to show."""
    return [(scale[0] - 1, scale[1] - 1) if length > 1 else (0.0, 0.0) for length in patch_size]


def affine(
    patch_size: Sequence[int],
    keys: Keys,
    degrees: float,
    scale: tuple[float, float],
    spacing: Sequence[float] | None,
    probability: float,
    elastic: float,
) -> Any:
    """Rotation, zoom, crop to the patch and, with probability ``elastic``, bending: one resampling."""
    rank = len(patch_size)
    axes = turning_axes(patch_size, spacing)
    angles = [math.radians(degrees) if axis in axes else 0.0 for axis in range(3)]
    common: dict[str, Any] = {
        "spatial_size": tuple(patch_size),
        "rotate_range": angles if rank == 3 else angles[2],
        "scale_range": zooms(patch_size, scale),
        "mode": ("bilinear", "nearest"),
        "padding_mode": "zeros",
    }
    # not RandAffined(prob=probability): where it only crops, MONAI 1.6 records the affine of an earlier draw
    straight = mt.OneOf(
        [mt.RandAffined(keys, prob=1.0, **common), mt.CenterSpatialCropd(keys, tuple(patch_size))],
        weights=[probability, 1 - probability],
    )
    if elastic <= 0:
        return straight
    if rank != 3 or elastic > 1:
        raise ValueError(f"elastic is a probability, for patches of three axes, got {elastic} and {rank} axes.")
    # uniform noise smoothed by sigma deviates by 0.087 sigma^-1.5: times the magnitude, 0.2 to 1.2 voxels
    bent = mt.Rand3DElasticd(keys, prob=1.0, sigma_range=(5.0, 7.0), magnitude_range=(50.0, 150.0), **common)
    return mt.OneOf([bent, straight], weights=[elastic, 1 - elastic])


def flips(axes: Sequence[int], keys: Keys) -> list[Any]:
    """Mirroring along each axis with probability 0.5."""
    return [mt.RandFlipd(keys, prob=0.5, spatial_axis=axis) for axis in axes]


def intensity(image: str, strength: float, probabilities: tuple[float, float, float, float]) -> list[Any]:
    """Noise, blur, brightness and contrast."""
    if strength == 0:
        return []
    noise, blur, brightness, contrast = probabilities
    sigma = (0.5 * strength, 1.0 * strength)
    return [
        mt.RandGaussianNoised(image, prob=noise, std=0.3 * strength),
        mt.RandGaussianSmoothd(image, prob=blur, sigma_x=sigma, sigma_y=sigma, sigma_z=sigma),
        mt.RandScaleIntensityd(image, prob=brightness, factors=0.25 * strength),
        mt.RandScaleIntensityFixedMeand(image, prob=contrast, factors=0.25 * strength, preserve_range=True),
    ]


def simulated_low_resolution(image: str, probability: float) -> list[Any]:
    """Half to all of the voxels per axis, and back."""
    # MONAI's default, nearest, moves the content by half a voxel; the mean over an area does not
    return [mt.RandSimulateLowResolutiond(image, prob=probability, zoom_range=(0.5, 1.0), downsample_mode="area")]


def gamma(image: str, strength: float, probability: float) -> list[Any]:
    """Gamma with mean and deviation kept, of the image and of its negative."""
    if strength == 0:
        return []
    span = (1 - 0.3 * min(strength, 2.0), 1 + 0.5 * strength)
    return [
        mt.RandAdjustContrastd(image, prob=0.1, gamma=span, retain_stats=True, invert_image=True),
        mt.RandAdjustContrastd(image, prob=probability, gamma=span, retain_stats=True),
    ]


class BiasFieldd(mt.RandomizableTransform, mt.MapTransform):  # type: ignore[misc]
    """A smooth multiplicative field, as the coils of an MR scanner cause it; each channel's mean and deviation stay.

    The field multiplies intensities above the patch's lowest, as in a scan: z-scored intensities can be negative,
    and would change in the wrong direction. All channels of a patch get the same field.

    Args:
        image: key of the image, (C, *spatial).
        prob: how often.
        coefficient: of the log field's Legendre polynomial of third degree, largest, both ways.

    Source:
        Sudre et al. 2017, Longitudinal segmentation of age-related white matter hyperintensities (the model of
        MONAI's ``RandBiasField``).
    """

    def __init__(self, image: str, prob: float, coefficient: float = 0.3) -> None:
        mt.RandomizableTransform.__init__(self, prob)
        mt.MapTransform.__init__(self, image)
        self.field = mt.RandBiasField(prob=1.0, degree=3, coeff_range=(-coefficient, coefficient))

    def set_random_state(self, seed: int | None = None, state: np.random.RandomState | None = None) -> BiasFieldd:
        """Seed the decision and the field."""
        super().set_random_state(seed, state)
        self.field.set_random_state(seed, state)
        return self

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        case = dict(data)
        self.randomize(None)
        if not self._do_transform:
            return case
        for key in self.key_iterator(case):
            before = case[key]
            axes = tuple(range(1, before.ndim))
            lowest = before.amin(axes, keepdim=True)
            after = self.field(before - lowest)
            spread = before.std(axes, keepdim=True) / after.std(axes, keepdim=True).clamp_min(1e-8)
            case[key] = (after - after.mean(axes, keepdim=True)) * spread + before.mean(axes, keepdim=True)
        return case


def shading(image: str, probability: float) -> list[Any]:
    """A bias field in this share of the patches; at 0 no transform at all."""
    if not 0 <= probability <= 1:
        raise ValueError(f"bias_field is a probability, got {probability}.")
    return [BiasFieldd(image, probability)] if probability > 0 else []
