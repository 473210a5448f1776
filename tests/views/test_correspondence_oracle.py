"""Correspondence against a coordinate volume: the scan's image is each voxel's own place, so that a view's
image says where each of its voxels came from, and the pair ids must agree."""

from __future__ import annotations

import monai.transforms as mt
import numpy as np
import pytest
import torch
from monai.data import MetaTensor

from medseg_supcon.views import (
    TwoViewsd,
    crop_resize_view,
    identity_view,
    randaugment_view,
    simclr_view,
    standard_view,
)

PATCH = (20, 24, 16)
KEYS = ("image", "label")
LINEAR = {"mode": ("bilinear", "nearest"), "padding_mode": "zeros"}

OBLIQUE = np.array([[0.8, -0.5, 0.1, -40], [0.55, 0.9, -0.2, 12], [0.1, 0.3, 2.4, 7], [0, 0, 0, 1.0]])
AFFINES = {
    "identity": np.eye(4),
    "anisotropic, left-handed": np.diag([-0.7, 0.7, 5.0, 1.0]),
    "oblique": OBLIQUE,
}
SHAPES = {"larger": (45, 41, 38), "smaller": (13, 24, 9), "mixed": (50, 18, 21)}


def geometric_policies() -> dict[str, mt.Compose]:
    """Each spatial augmentation alone, then all of them together; intensities as they are."""
    plain = {"strength": 0.0, "low_resolution": 0.0}
    off = {"rotation_degrees": 0.0, "scale": (1.0, 1.0)}
    return {
        "identity": identity_view(PATCH),
        "flip": standard_view(PATCH, flip_axes=(0, 1, 2), affine_probability=0.0, **plain),
        "rotation": standard_view(PATCH, **{**plain, **off, "rotation_degrees": 30.0}),
        "rotation in plane": standard_view(PATCH, spacing=(1, 1, 4), **{**plain, "scale": (1.0, 1.0)}),
        "zoom": standard_view(PATCH, **{**plain, **off, "scale": (0.7, 1.4)}),
        "crop and resize": crop_resize_view(PATCH, flip_axes=(1,)),
        "all affine": standard_view(PATCH, flip_axes=(0, 1, 2), affine_probability=1.0, **plain),
        "sometimes": mt.Compose(
            [
                mt.RandAffined(KEYS, prob=0.5, shear_range=(0.2, 0.1), translate_range=(2, 3, 1), **LINEAR),
                mt.RandRotated(KEYS, range_x=0.4, prob=0.5, **LINEAR),
                mt.RandFlipd(KEYS, prob=0.5, spatial_axis=2),
            ]
        ),
        "rot90": mt.Compose([mt.RandRotate90d(KEYS, prob=1.0, spatial_axes=(0, 1))]),
        "rotated": mt.Compose([mt.RandRotated(KEYS, range_x=0.4, range_z=0.4, prob=1.0, **LINEAR)]),
        "zoomed": mt.Compose(
            [
                mt.RandZoomd(
                    KEYS,
                    prob=1.0,
                    min_zoom=0.8,
                    max_zoom=1.3,
                    mode=("trilinear", "nearest"),
                    padding_mode="constant",
                )
            ]
        ),
        "cropped": mt.Compose([mt.RandSpatialCropd(KEYS, roi_size=PATCH, random_size=False)]),
        "lazy": mt.Compose(
            [
                mt.RandFlipd(KEYS, prob=0.5, spatial_axis=1),
                mt.RandRotated(KEYS, range_y=0.4, prob=1.0, **LINEAR),
            ],
            lazy=True,
        ),
    }


def coordinate_case(shape: tuple[int, ...], affine: np.ndarray) -> dict[str, object]:
    """Channels x, y, z (voxels) and 1; the label is the voxel's linear index."""
    index = torch.stack(torch.meshgrid(*[torch.arange(n) for n in shape], indexing="ij")).float()
    image = torch.cat([index, torch.ones(1, *shape)])
    label = torch.arange(int(np.prod(shape))).reshape(1, *shape)
    affine_t = torch.from_numpy(affine)
    return {
        "image": MetaTensor(image, affine=affine_t),
        "label": MetaTensor(label, affine=affine_t),
        "name": "c",
    }


def places(view: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """(n, 3) scan coordinates of a view's voxels and (n,) whether padding was kept out of them."""
    flat = view.double().reshape(4, -1).numpy()
    return flat[:3].T, flat[3] > 0.99999


def errors(item: dict[str, torch.Tensor]) -> tuple[float, float]:
    """Largest excess of a pair over the nearest view-1 voxel, and share of pairable voxels left unpaired."""
    (place_1, sure_1), (place_2, sure_2) = places(item["image"][0]), places(item["image"][1])
    ids_1, ids_2 = item["pair_ids"].reshape(2, -1).numpy()
    assert np.array_equal(ids_1[ids_1 >= 0], np.flatnonzero(ids_1 >= 0))
    assert (ids_1[sure_1] >= 0).all()
    # distances in voxels of view 1, whose steps in the scan an affine fit gives
    index = np.stack(np.unravel_index(np.arange(len(place_1)), item["image"].shape[2:]), 1)
    fit = np.linalg.lstsq(np.c_[index, np.ones(len(index))][sure_1], place_1[sure_1], rcond=None)[0]
    unit = np.linalg.inv(fit[:3])
    centres = torch.from_numpy(place_1[sure_1] @ unit)
    paired = sure_2 & (ids_2 >= 0)
    paired[paired] = sure_1[ids_2[paired]]
    assert paired.any()
    # brute force, every fifth voxel to keep it short
    asked = np.flatnonzero(sure_2)[::5]
    distance = torch.cdist(torch.from_numpy(place_2[asked] @ unit), centres).amin(dim=1).numpy()
    found = np.linalg.norm((place_2[asked] - place_1[ids_2[asked]]) @ unit, axis=1)
    excess = (found - distance)[paired[asked]].max()
    # nearer than half a voxel to a centre of view 1 is inside view 1 on any grid
    missed = (distance < 0.49) & (ids_2[asked] < 0)
    return float(excess), float(missed.mean())


@pytest.mark.parametrize("affine", AFFINES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("policy", geometric_policies())
def test_pairs_are_nearest(policy: str, shape: str, affine: str) -> None:
    # a policy that crops for itself gets little room, so that the views overlap
    context = 0.3 if policy == "cropped" else 1.45
    views = TwoViewsd(PATCH, geometric_policies()[policy], foreground=0.0, context=context)
    case = coordinate_case(SHAPES[shape], AFFINES[affine])
    excess, missed = errors(views.set_random_state(1)(case))
    assert excess < 1e-4
    assert missed == 0


@pytest.mark.parametrize("policy", geometric_policies())
def test_pairs_are_nearest_draw_after_draw(policy: str) -> None:
    # a draw may leave a transform out, or leave traces of itself for the next
    views = TwoViewsd(PATCH, geometric_policies()[policy], foreground=0.0, context=0.3 if policy == "cropped" else 1.45)
    case = coordinate_case((38, 36, 30), OBLIQUE)
    for seed in range(12):
        excess, missed = errors(views.set_random_state(seed)(case))
        assert excess < 1e-4
        assert missed == 0


INTENSITY = {
    "standard": (standard_view(PATCH, flip_axes=(0, 1, 2), affine_probability=1.0), 1.45),
    "strong": (standard_view(PATCH, strength=2.0, low_resolution=1.0), 1.45),
    "simclr": (simclr_view(PATCH), 0.0),
    "randaugment": (randaugment_view(PATCH, num_ops=4, magnitude=0.9), 0.0),
}


@pytest.mark.parametrize("policy", INTENSITY)
@pytest.mark.parametrize("channels", [1, 4])
def test_pairs_name_the_same_voxel_with_all_augmentation(policy: str, channels: int) -> None:
    # here the label map is the oracle: nearest interpolation tells each view voxel's scan voxel
    shape, (view, context) = (30, 33, 26), INTENSITY[policy]
    case = coordinate_case(shape, OBLIQUE)
    case["image"] = MetaTensor(torch.randn(channels, *shape), affine=torch.from_numpy(OBLIQUE))
    views = TwoViewsd(PATCH, view, crop_resize_view(PATCH), foreground=0.0, context=max(context, 1.0))
    for seed in range(3):
        item = views.set_random_state(seed)(case)
        assert torch.isfinite(item["image"]).all()
        ids_2 = item["pair_ids"][1].reshape(-1).numpy()
        labels_1, labels_2 = item["label"].reshape(2, -1).numpy()
        paired = np.flatnonzero(ids_2 >= 0)
        partner = ids_2[paired]
        seen = (labels_1[partner] >= 0) & (labels_2[paired] >= 0)
        assert seen.mean() > 0.95
        one = np.stack(np.unravel_index(labels_1[partner][seen], shape), 1)
        two = np.stack(np.unravel_index(labels_2[paired][seen], shape), 1)
        # half a voxel of either rounding and half of a view-1 voxel, up to 1.4 x sqrt(3) scan voxels wide
        assert np.abs(one - two).max() <= 2
        assert np.abs((one - two).mean(axis=0)).max() < 0.2
