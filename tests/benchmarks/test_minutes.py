"""What `benchmarks.minutes` adds up, against numpy and loops; nnU-Net is not needed."""

from __future__ import annotations

import sys
from pathlib import Path

import nibabel
import numpy as np
import pytest

from medseg_supcon.datasets import Case

sys.path.insert(0, str(Path(__file__).parents[2]))  # benchmarks are not installed

from benchmarks._process import run
from benchmarks.minutes import (
    CLEAN,
    CONDITIONS,
    NNUNET,
    OURS,
    STAGES,
    cost_table,
    dice_table,
    scan_name,
    scores,
    write_scans,
)

LABELS = {"background": 0, "one": 1, "two": 2}
SHAPE = (12, 10, 8)


@pytest.fixture
def cases(tmp_path: Path) -> list[Case]:
    rng = np.random.default_rng(0)
    made = []
    for name in ("a", "b"):
        files = tmp_path / f"{name}.nii.gz", tmp_path / f"{name}_label.nii.gz"
        nibabel.save(nibabel.Nifti1Image(rng.normal(100, 20, SHAPE).astype(np.float32), np.eye(4)), files[0])
        nibabel.save(nibabel.Nifti1Image(rng.integers(0, 3, SHAPE, dtype=np.uint8), np.eye(4)), files[1])
        made.append(Case(name, (files[0],), files[1]))
    return made


def voxels(file: Path) -> np.ndarray:
    return np.asarray(nibabel.load(file).dataobj)


def test_a_score_is_the_mean_dice_of_the_classes(cases: list[Case], tmp_path: Path) -> None:
    rng, expected = np.random.default_rng(1), {}
    for condition in CONDITIONS:
        for case in cases:
            mask = rng.integers(0, 3, SHAPE, dtype=np.uint8)
            nibabel.save(nibabel.Nifti1Image(mask, np.eye(4)), tmp_path / f"{scan_name(condition, case)}.nii.gz")
            truth, of_class = voxels(case.label).ravel().tolist(), []
            for value in (1, 2):
                pairs = [(p == value, t == value) for p, t in zip(mask.ravel().tolist(), truth, strict=True)]
                of_class.append(2 * sum(p and t for p, t in pairs) / sum(p + t for p, t in pairs))
            expected[condition, case.name] = sum(of_class) / 2
    found = scores(tmp_path, cases, LABELS)
    assert {(name, case.name): found[name][k] for name in CONDITIONS for k, case in enumerate(cases)} == pytest.approx(
        expected
    )


def test_the_table_pairs_scans_and_seeds() -> None:
    rng = np.random.default_rng(2)
    base = rng.uniform(0.5, 0.7, (2, len(CONDITIONS), 30))  # seed, condition, scan
    gain = 0.02 + 0.001 * rng.standard_normal(base.shape)  # much smaller than the spread of the scans
    tables = [[dict(zip(CONDITIONS, seed, strict=True)) for seed in tool] for tool in (base + gain, base)]
    rows = {line.split("|")[1].strip(): line.split("|")[2:5] for line in dice_table(*tables)[2:]}
    assert list(rows) == [*CONDITIONS, "mean of the degraded"]
    for name, (mine, theirs, difference) in rows.items():
        chosen = [name == one or (name == "mean of the degraded" and one != CLEAN) for one in CONDITIONS]
        assert float(mine) == pytest.approx((base + gain)[:, chosen].mean(), abs=6e-5)
        assert float(theirs) == pytest.approx(base[:, chosen].mean(), abs=6e-5)
        points, interval = difference.split("(")
        low, high = map(float, interval.strip(" )").split(" to "))
        assert float(points) == pytest.approx(100 * gain[:, chosen].mean(), abs=0.06)
        assert 1.8 < low <= float(points) <= high < 2.2  # unpaired, it would be several points wide


def test_the_costs_are_means_in_minutes() -> None:
    def cost(factor: float) -> dict[str, dict[str, float]]:
        return {stage: {"seconds": 60 * factor * n, "cpu": 90 * factor * n} for n, stage in enumerate(STAGES, 1)}

    lines = cost_table({OURS: [cost(1), cost(3)], NNUNET: [cost(10), cost(10)]})
    cells = [[float(cell) for cell in line.split("|")[2:-1]] for line in lines[2:]]
    assert cells == [[2, 3, 10, 15], [4, 6, 20, 30], [6, 9, 30, 45]]


def test_every_condition_changes_the_scan_in_place(cases: list[Case], tmp_path: Path) -> None:
    write_scans(cases, tmp_path / "scans")
    for case in cases:
        original = voxels(case.images[0])
        for condition in CONDITIONS:
            made = nibabel.load(tmp_path / "scans" / f"{scan_name(condition, case)}.nii.gz")
            assert made.shape == SHAPE and np.array_equal(made.affine, np.eye(4))
            assert np.array_equal(np.asarray(made.dataobj), original) == (condition == CLEAN)
        turned = voxels(tmp_path / "scans" / f"{scan_name('inverted contrast', case)}.nii.gz")
        assert np.corrcoef(turned.ravel(), original.ravel())[0, 1] < -0.99


def test_processor_time_is_that_of_the_whole_tree() -> None:
    burn = "import time; end = time.process_time() + 0.3\nwhile time.process_time() < end: pass"
    start = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {burn!r}], check=True)"
    assert 0.3 <= run([sys.executable, "-c", start], 1).cpu < 5
