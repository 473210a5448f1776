"""Corrupted test scans: seeded, on the scan's own grid, with the anatomy in place."""

from __future__ import annotations

from pathlib import Path

import nibabel
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medseg_supcon.comparison import CORRUPTIONS, corrupt_cases
from medseg_supcon.datasets import Case

ALL = sorted(CORRUPTIONS)


def ball(shape):
    grid = np.stack(np.meshgrid(*[np.linspace(-1, 1, n) if n > 1 else np.zeros(1) for n in shape], indexing="ij"))
    return (100 * ((grid**2).sum(0) < 0.5) + 20 + 3 * grid[0]).astype(np.float32)[None]


@pytest.mark.parametrize("name", ALL)
@settings(deadline=None, max_examples=8, derandomize=True)
@given(shape=st.tuples(*[st.integers(1, 17)] * 3))
def test_any_shape_is_kept_and_the_draw_is_seeded(name, shape):
    volume = ball(shape)
    before = volume.copy()
    worse = CORRUPTIONS[name](volume, 3)
    assert worse.shape == volume.shape and worse.dtype == np.float32 and np.isfinite(worse).all()
    assert np.array_equal(worse, CORRUPTIONS[name](volume, 3))
    assert np.array_equal(volume, before)


@pytest.mark.parametrize("name", ALL)
def test_a_scan_gets_worse_but_stays_recognisable(name):
    volume = ball((24, 20, 16))
    worse = CORRUPTIONS[name](volume, 1)
    assert np.abs(worse - volume).mean() > 0.5
    assert np.corrcoef(worse.ravel(), volume.ravel())[0, 1] > 0.8


def test_noise_has_a_tenth_of_the_range():
    volume = ball((32, 32, 32))
    low, high = np.percentile(volume, (0.5, 99.5))
    noise = CORRUPTIONS["noise"](volume, 0) - volume
    assert noise.std() == pytest.approx(0.1 * (high - low), rel=0.03) and abs(noise.mean()) < 0.3


def test_low_resolution_moves_nothing():
    volume = ball((24, 24, 24))
    grid = np.stack(np.meshgrid(*[np.arange(24)] * 3, indexing="ij")).reshape(3, -1)

    def centre(v):
        weight = (v - v.min()).ravel()
        return grid @ weight / weight.sum()

    assert np.allclose(centre(CORRUPTIONS["low resolution"](volume, 0)), centre(volume), atol=0.05)


def test_a_bias_field_is_smooth_and_multiplies():
    volume = ball((24, 24, 24)) - 500  # CT has negative values
    field = (CORRUPTIONS["bias field"](volume, 2) - volume.min()) / (volume - volume.min() + 1e-9)
    inside = field[0][volume[0] > volume.min() + 30]
    assert inside.min() > 0.2 and np.ptp(inside) > 0.05
    assert np.abs(np.diff(field[0, 10:14, 12, 12])).max() < 0.2


def test_ghosts_keep_the_mean():
    volume = ball((24, 24, 24))
    assert CORRUPTIONS["ghosting"](volume, 0).mean() == pytest.approx(volume.mean(), rel=1e-5)


@pytest.mark.parametrize("channels", [None, 2])
def test_files_keep_their_grid(tmp_path, channels):
    affine = np.array([[0, -2.0, 0, 5], [1.5, 0, 0, -3], [0, 0, 3.0, 7], [0, 0, 0, 1]])
    data = ball((12, 10, 8))[0].astype(np.int16)
    if channels:
        data = np.stack([data, data[::-1]], -1)
    file = tmp_path / "a.nii.gz"
    nibabel.save(nibabel.Nifti1Image(data, affine), file)
    case = Case("a", (Path(file),), Path("label.nii.gz"))
    worse = corrupt_cases([case], "noise", tmp_path / "noise")[0]
    image = nibabel.load(worse.images[0])
    assert image.shape == data.shape and np.allclose(image.affine, affine)
    assert worse.label == case.label and worse.images[0].parent == tmp_path / "noise"
    written = worse.images[0].read_bytes()
    corrupt_cases([case], "noise", tmp_path / "noise")
    corrupt_cases([case], "noise", tmp_path / "again")
    assert worse.images[0].read_bytes() == written
    assert np.array_equal(nibabel.load(tmp_path / "again" / worse.images[0].name).dataobj, image.dataobj)
