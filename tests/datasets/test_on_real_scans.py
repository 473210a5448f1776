"""Reading, checking and planning on real data sets, if MEDSEG_DATA names their folder."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from medseg_supcon.datasets import check_dataset, fingerprint, read_dataset
from medseg_supcon.plan import make_plan, validate_plan

EXPECTED = {
    "Task04_Hippocampus": (208, [40, 56, 40], [1.0, 1.0, 1.0]),
    "LeftAtrium_1p5mm": (80, [56, 40, 40], [1.5, 1.5, 1.5]),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_real_data(name):
    root = Path(os.environ.get("MEDSEG_DATA", "")) / name
    if "MEDSEG_DATA" not in os.environ or not root.is_dir():
        pytest.skip(f"MEDSEG_DATA names no folder that holds {name}")
    cases, patch, spacing = EXPECTED[name]
    dataset = read_dataset(root)
    assert len(dataset.labelled) == cases
    assert not check_dataset(dataset).findings
    plan = make_plan(fingerprint(dataset), dataset)
    validate_plan(plan)
    assert (plan["patch_size"], plan["spacing"]) == (patch, spacing)
