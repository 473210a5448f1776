"""Changes of intensity against MONAI's transforms of the same kind, with the parameters that the seed draws."""

from __future__ import annotations

from typing import Any

import monai.transforms as mt
import numpy as np
import pytest
import torch
from scipy import ndimage, stats

from medseg_supcon.views import leaves, standard_view

SHAPE = (18, 25, 22)
SHARES = {"gaussian_noise": 0.1, "blur": 0.2, "brightness": 0.15, "contrast": 0.15, "low_resolution": 0.25}


def scan(channels: int = 2) -> torch.Tensor:
    noise = np.random.default_rng(0).standard_normal((channels, *SHAPE))
    return torch.from_numpy(ndimage.gaussian_filter(noise, (0, 1, 1, 1)).astype(np.float32) * 3 - 0.5)


def transforms(**options: Any) -> dict[tuple[str, bool], Any]:
    """standard_view's, by the name of the change and whether it changes the negative."""
    found = [t for t in leaves(standard_view(SHAPE, **options)) if hasattr(t, "change")]
    return {(t.change.__name__, t.arguments.get("negative", False)): t for t in found}


def theirs(name: str, negative: bool, image: torch.Tensor, random: np.random.RandomState) -> Any:
    """MONAI's result for the draws that follow in ``random``."""
    if name == "blur":
        return mt.GaussianSmooth(random.uniform(0.5, 1.0, 3).tolist())(image)
    if name == "brightness":
        return mt.ScaleIntensity(minv=None, maxv=None, factor=random.uniform(-0.25, 0.25))(image)
    if name == "contrast":
        return mt.ScaleIntensityFixedMean(factor=random.uniform(-0.25, 0.25), preserve_range=True)(image)
    if name == "power":
        return mt.AdjustContrast(random.uniform(0.7, 1.5), invert_image=negative, retain_stats=True)(image)
    coarse = mt.RandSimulateLowResolution(prob=1.0, downsample_mode="area")
    coarse.randomize()
    coarse.zoom_factor = random.uniform(0.5, 1.0)
    return coarse(image, randomize=False)


@pytest.mark.parametrize("key", [k for k in transforms() if k[0] != "gaussian_noise"], ids=str)
def test_a_change_is_monais(key: tuple[str, bool]) -> None:
    transform, image, changed = transforms()[key], scan(), 0
    for seed in range(5):
        before = image.clone()
        random = np.random.RandomState(seed)
        ours = transform.change(before, random, **transform.arguments)
        assert torch.equal(before, image)  # not in place
        expected = torch.as_tensor(theirs(*key, image, np.random.RandomState(seed)))
        # MONAI cuts a Gaussian at 4 sigma
        torch.testing.assert_close(ours, expected, atol=2e-3 if key[0] == "blur" else 2e-5, rtol=1e-5)
        changed += not torch.allclose(ours, image, atol=1e-3)
    assert changed >= 3


def test_noise_is_normal_and_as_strong_as_drawn() -> None:
    transform, image, strengths = transforms()["gaussian_noise", False], scan(), []
    for seed in range(40):
        added = (transform.change(image, np.random.RandomState(seed), **transform.arguments) - image).flatten().numpy()
        strengths.append(added.std())
        assert stats.kstest(added[::7] / added.std(), "norm").pvalue > 1e-4 and abs(added.mean()) < 0.01
    assert stats.kstest(np.array(strengths) / 0.3, "uniform").pvalue > 1e-3


@pytest.mark.parametrize("name", SHARES)
def test_the_shares_are_nnunets(name: str) -> None:
    transform, image = transforms()[name, False].set_random_state(0), scan()
    changed = [transform({"image": image})["image"] is not image for _ in range(600)]
    assert np.mean(changed) == pytest.approx(SHARES[name], abs=0.05)
