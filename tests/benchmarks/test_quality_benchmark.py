"""The figures and test scans of `benchmarks.quality`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from nibabel.orientations import apply_orientation, io_orientation, ornt_transform
from scipy.spatial.transform import Rotation
from sklearn.metrics import roc_auc_score

from benchmarks._quality_table import add_pairwise, auroc, excess_aurc, mean_with_interval, table
from benchmarks._test_scans import UNKNOWN, write_dicom
from medseg_supcon.inference import find_scans
from medseg_supcon.quality import Degraded, degradations
from medseg_supcon.scans import read_scan

RNG = np.random.default_rng(0)


def test_the_excess_aurc_is_0_for_the_perfect_order_and_about_1_for_random_ones() -> None:
    dice = RNG.random(300)
    assert excess_aurc(dice, dice) == pytest.approx(0, abs=1e-12)
    assert excess_aurc(dice, -dice) > 1.5
    assert np.mean([excess_aurc(dice, RNG.random(300)) for _ in range(200)]) == pytest.approx(1, abs=0.05)


def test_the_auroc_is_scikit_learns() -> None:
    score = RNG.random(200).round(1)  # with ties
    failed = RNG.random(200) > score
    assert auroc(failed, score) == pytest.approx(roc_auc_score(failed, -score))
    assert np.isnan(auroc(np.zeros(3, dtype=bool), score[:3]))


def test_pairwise_dice_is_the_mean_over_the_other_runs() -> None:
    whole, half, none = np.ones(8, dtype=np.uint8), np.repeat([1, 0], 4).astype(np.uint8), np.zeros(8, dtype=np.uint8)
    runs = [([{"scan": "a", "kind": "clean", "scores": {}}], [mask]) for mask in (whole, half, none)]
    add_pairwise(runs)
    values = [rows[0]["scores"]["pairwise Dice"] for rows, _ in runs]
    assert values == pytest.approx([(8 / 12 + 0) / 2, (8 / 12 + 0) / 2, 0])


def test_differences_are_paired_over_the_seeds_that_both_recipes_have() -> None:
    results = {("a", 0): {"x": 1.0}, ("a", 1): {"x": 2.0}, ("b", 1): {"x": 1.5}}
    assert table("t", results, ["a", "b"])[-1] == "| x | 1.500 +- 6.353 (1.000, 2.000) | 1.500 | 0.500 |"
    # 12.706: the 97.5th percentile of Student's t with one degree of freedom
    assert mean_with_interval(np.array([1.0, 2.0])).startswith(f"1.500 +- {12.7062 * 0.5:.3f}")


def test_a_scan_comes_back_from_its_dicom_series(tmp_path: Path) -> None:
    affine = np.eye(4)
    turn = Rotation.from_euler("xyz", [5, -8, 12], degrees=True).as_matrix()
    affine[:3, :3], affine[:3, 3] = turn @ np.diag([0.9, 1.1, 2.5]), (-17, 12, -30)
    image = RNG.normal(50, 20, (9, 7, 5)).astype(np.float32)
    write_dicom(tmp_path / "scan", image, affine)
    (scan,) = find_scans([tmp_path / "scan"], ["MRI"])
    volume = read_scan(scan, 1)
    back = apply_orientation(volume.data, ornt_transform(io_orientation(volume.affine), io_orientation(affine)))
    np.testing.assert_allclose(back, image, atol=np.ptp(image) / 32000)
    first = np.linalg.inv(volume.affine) @ affine @ [0, 0, 0, 1]  # voxel (0, 0, 0), seen from the series
    assert all(min(abs(v), abs(v - n + 1)) < 1e-3 for v, n in zip(first, volume.data.shape, strict=False))


@pytest.mark.parametrize("kind", UNKNOWN)
def test_unknown_kinds_change_the_scan_the_same_way_each_time_and_are_not_in_the_fit(kind: str) -> None:
    assert kind not in degradations(1)
    label = np.zeros((12, 10, 9), dtype=np.int16)
    label[3:8, 3:8, 3:7] = 1
    original = Degraded((RNG.random((1, *label.shape)) + label).astype(np.float32), label)
    one, two = (UNKNOWN[kind](original, 0.8, np.random.default_rng(3)) for _ in range(2))
    assert np.array_equal(one.image, two.image) and np.array_equal(one.label, two.label)
    assert one.image.shape == original.image.shape and not np.array_equal(one.image, original.image)
