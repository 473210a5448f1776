"""Rotation, zoom, shift and mirror against SciPy, and their distribution against MONAI's transforms."""

from __future__ import annotations

import math

import monai.transforms as mt
import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from scipy import ndimage, stats

from medseg_supcon.views import AffinePatchd

BOX, PATCH = (21, 26, 18), (15, 16, 12)
RANGES = {
    "rotate_range": [0.5, 0.3, 0.4],
    "translate_range": [2.0, 3.0, 1.0],
    "scale_range": [(-0.3, 0.4), (-0.1, 0.1), (0.0, 0.0)],
}
WORLD = np.array([[0.8, -0.5, 0.1, -40], [0.55, 0.9, -0.2, 12], [0.1, 0.3, 2.4, 7], [0, 0, 0, 1.0]])


def box() -> dict[str, MetaTensor]:
    rng = np.random.default_rng(0)
    image = ndimage.gaussian_filter(rng.standard_normal((2, *BOX)), (0, 1, 1, 1)).astype(np.float32)
    label = np.arange(1, np.prod(BOX) + 1, dtype=np.float32).reshape(1, *BOX)
    affine = torch.from_numpy(WORLD)
    return {
        "image": MetaTensor(torch.from_numpy(image), affine=affine),
        "label": MetaTensor(torch.from_numpy(label), affine=affine),
    }


@pytest.mark.parametrize("prob", [0.0, 1.0])
def test_the_affine_says_where_the_voxels_come_from(prob: float) -> None:
    before = box()
    patch = AffinePatchd(PATCH, prob, flip_axes=(0, 2), **RANGES)
    mirrored = set()
    for seed in range(12):
        after = patch.set_random_state(seed)(before)
        matrix = np.linalg.inv(WORLD) @ after["image"].affine.numpy()
        mirrored.add((matrix[0, 0] < 0, matrix[1, 1] < 0, matrix[2, 2] < 0))
        assert torch.equal(after["label"].affine, after["image"].affine)
        places = np.einsum("ij,jxyz->ixyz", matrix[:3, :3], np.indices(PATCH)) + matrix[:3, 3].reshape(3, 1, 1, 1)
        for channel, values in zip(before["image"].numpy(), after["image"].numpy(), strict=True):
            expected = ndimage.map_coordinates(channel, places, order=1, mode="grid-constant")
            np.testing.assert_allclose(values, expected, atol=2e-5)
        nearest = ndimage.map_coordinates(before["label"].numpy()[0], places, order=0, mode="grid-constant")
        assert (after["label"].numpy()[0] == nearest).mean() > 0.999  # but for ties
        # the middle of the patch is the middle of the box, but for the shift
        middle = matrix[:3, :3] @ ((np.array(PATCH) - 1) / 2) + matrix[:3, 3] - (np.array(BOX) - 1) / 2
        assert np.linalg.norm(middle) <= (0.5 if prob == 0 else np.linalg.norm([2.5, 3.5, 1.5]))
    assert mirrored == {(x, False, z) for x in (False, True) for z in (False, True)}


def test_draws_are_distributed_as_those_of_monai() -> None:
    """RandAffined and RandFlipd, by what they write into the affine."""
    ours = AffinePatchd(PATCH, 1.0, flip_axes=(1,), **RANGES)
    keys = ("image", "label")
    theirs = mt.Compose([
        mt.RandAffined(keys, prob=1.0, spatial_size=PATCH, mode=("bilinear", "nearest"), padding_mode="zeros", **RANGES),
        mt.RandFlipd(keys, prob=0.5, spatial_axis=1),
    ])  # fmt: skip
    plain = {key: MetaTensor(torch.zeros(1, *PATCH), affine=torch.eye(4)) for key in keys}
    drawn = []
    for policy in (ours, theirs):
        policy.set_random_state(1)
        drawn.append(np.stack([policy(plain)["image"].affine.numpy()[:3].ravel() for _ in range(300)]))
    for one, other in zip(*(draws.T for draws in drawn), strict=True):
        assert stats.ks_2samp(one, other).pvalue > 1e-3


def test_so_many_draws_are_rotated() -> None:
    patch = AffinePatchd(PATCH, 0.2, rotate_range=(0.0, 0.0, math.pi / 6)).set_random_state(0)
    plain = {key: torch.zeros(1, *BOX) for key in ("image", "label")}
    rotated = [bool(patch(plain)["image"].affine[0, 1] != 0) for _ in range(400)]
    assert 55 <= sum(rotated) <= 105
