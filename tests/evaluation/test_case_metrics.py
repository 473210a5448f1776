"""Dice, HD95, surface Dice and volumes against loops in float64 and SimpleITK."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import SimpleITK as sitk
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import gaussian_filter

from medseg_supcon.evaluation import case_metrics

LABELS = {"background": 0, "organ": 4, "lesion": 255}


def surface(mask: np.ndarray) -> list[tuple[int, ...]]:
    """Voxels of the mask with a face neighbour outside it (or outside the scan)."""
    found = []
    for voxel in map(tuple, np.argwhere(mask)):
        for axis, step in itertools.product(range(3), (-1, 1)):
            other = list(voxel)
            other[axis] += step
            inside = 0 <= other[axis] < mask.shape[axis]
            if not inside or not mask[tuple(other)]:
                found.append(voxel)
                break
    return found


def distances(of: np.ndarray, to: np.ndarray, spacing: tuple[float, ...]) -> list[float]:
    return [
        min(math.dist([a * s for a, s in zip(p, spacing, strict=True)], q) for q in _scaled(surface(to), spacing))
        for p in surface(of)
    ]


def _scaled(points: list[tuple[int, ...]], spacing: tuple[float, ...]) -> list[list[float]]:
    return [[a * s for a, s in zip(point, spacing, strict=True)] for point in points]


def percentile(values: list[float], q: float) -> float:
    """Linear interpolation between order statistics."""
    ordered = sorted(values)
    position = (len(ordered) - 1) * q / 100
    low = math.floor(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


def random_labels(shape: tuple[int, ...], seed: int, sigma: float = 1.2) -> np.ndarray:
    field = gaussian_filter(np.random.default_rng(seed).normal(size=shape), sigma)
    return np.select([field > np.quantile(field, 0.8), field > np.quantile(field, 0.5)], [255, 4], 0)


@settings(deadline=None, max_examples=25, derandomize=True)
@given(
    shape=st.tuples(*[st.integers(1, 9)] * 3),
    spacing=st.tuples(*[st.floats(0.3, 5.0)] * 3),
    seeds=st.tuples(st.integers(0, 50), st.integers(0, 50)),
    tolerance=st.floats(0.4, 4.0),
    ignored=st.booleans(),
)
def test_against_loops(
    shape: tuple[int, int, int],
    spacing: tuple[float, float, float],
    seeds: tuple[int, int],
    tolerance: float,
    ignored: bool,
) -> None:
    p, r = random_labels(shape, seeds[0]), random_labels(shape, seeds[1])
    ignore = np.random.default_rng(0).random(shape) < 0.2 if ignored else None
    for row in case_metrics(p, r, spacing, LABELS, ignore, tolerance):
        value = LABELS[row["class"]]
        keep = np.ones(shape, dtype=bool) if ignore is None else ~ignore
        a, b = (p == value) & keep, (r == value) & keep
        voxel = math.prod(spacing) / 1000
        assert row["volume_ml"] == pytest.approx(a.sum() * voxel)
        assert row["reference_volume_ml"] == pytest.approx(b.sum() * voxel)
        if not a.any() or not b.any():
            continue
        both = sum(1 for v in np.ndindex(shape) if a[v] and b[v])
        assert row["dice"] == pytest.approx(2 * both / (a.sum() + b.sum()))
        forth, back = distances(a, b, spacing), distances(b, a, spacing)
        assert row["hd95_mm"] == pytest.approx(max(percentile(forth, 95), percentile(back, 95)), rel=1e-5, abs=1e-5)
        if all(abs(d - tolerance) > 1e-4 for d in forth + back):
            within = sum(d <= tolerance for d in forth + back)
            assert row["surface_dice"] == pytest.approx(within / len(forth + back))


@pytest.mark.parametrize("seed", range(3))
def test_dice_and_the_largest_distance_agree_with_simpleitk(seed: int) -> None:
    p, r = random_labels((20, 18, 12), seed, 2.0), random_labels((20, 18, 12), seed + 10, 2.0)
    spacing = (0.7, 1.1, 3.0)
    images = []
    for labels in (p, r):
        image = sitk.GetImageFromArray((labels == 255).astype(np.uint8).T)
        image.SetSpacing(spacing)
        images.append(image)
    overlap = sitk.LabelOverlapMeasuresImageFilter()
    overlap.Execute(*images)
    row = case_metrics(p, r, spacing, LABELS)[1]
    assert row["dice"] == pytest.approx(overlap.GetDiceCoefficient())
    hausdorff = sitk.HausdorffDistanceImageFilter()
    hausdorff.Execute(*images)
    assert row["hd95_mm"] <= hausdorff.GetHausdorffDistance() + 1e-4
    statistics = sitk.LabelShapeStatisticsImageFilter()
    statistics.Execute(images[0])
    assert row["volume_ml"] == pytest.approx(statistics.GetPhysicalSize(1) / 1000)


def test_a_shifted_box_in_closed_form() -> None:
    r = np.zeros((20, 20, 20), int)
    r[5:15, 5:15, 5:15] = 4
    p = np.roll(r, 2, axis=2)
    organ, lesion = case_metrics(p, r, (1, 1, 1.5), LABELS, tolerance_mm=3.0)
    assert organ["dice"] == pytest.approx(0.8)
    assert organ["hd95_mm"] == pytest.approx(3.0)
    assert organ["surface_dice"] == 1.0
    assert organ["tolerance_mm"] == 3.0
    assert lesion["empty"] == "both"
    assert case_metrics(p, r, (1, 1, 1.5), LABELS, tolerance_mm=2.9)[0]["surface_dice"] < 1


def test_the_rule_for_empty_classes() -> None:
    empty, full = np.zeros((4, 6, 8), int), np.full((4, 6, 8), 4)
    diagonal = math.sqrt((4 * 1) ** 2 + (6 * 2) ** 2 + (8 * 0.5) ** 2)
    for p, r, kind in ((empty, full, "prediction"), (full, empty, "reference")):
        row = case_metrics(p, r, (1, 2, 0.5), LABELS)[0]
        assert (row["dice"], row["surface_dice"], row["empty"]) == (0.0, 0.0, kind)
        assert row["hd95_mm"] == pytest.approx(diagonal)
    row = case_metrics(empty, empty, (1, 2, 0.5), LABELS)[0]
    assert (row["dice"], row["hd95_mm"], row["surface_dice"], row["empty"]) == (None, None, None, "both")


def test_what_nobody_labelled_counts_nowhere() -> None:
    r = random_labels((10, 10, 10), 1)
    ignore = np.zeros(r.shape, dtype=bool)
    ignore[:4] = True
    p = r.copy()
    p[:4] = random_labels((10, 10, 10), 2)[:4]
    for row in case_metrics(p, r, (1, 1, 1), LABELS, ignore):
        assert row["dice"] == 1.0
        assert row["hd95_mm"] == 0.0
        assert row["volume_ml"] == row["reference_volume_ml"]
        assert row["volume_ml"] == pytest.approx((r[4:] == LABELS[row["class"]]).sum() / 1000)


@pytest.mark.parametrize(
    "change",
    [
        {"prediction": np.zeros((3, 3, 4))},
        {"spacing_mm": (1, 1)},
        {"spacing_mm": (1, 0, 1)},
        {"tolerance_mm": 0.0},
    ],
)
def test_bad_arguments_are_quoted(change: dict[str, object]) -> None:
    arguments = {"prediction": np.zeros((3, 3, 3)), "reference": np.zeros((3, 3, 3)), "spacing_mm": (1, 1, 1)}
    with pytest.raises(ValueError, match="got"):
        case_metrics(**{**arguments, "labels": LABELS, **change})  # type: ignore[arg-type]
