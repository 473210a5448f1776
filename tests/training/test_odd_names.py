"""Folders and scans whose names contain the special characters of MONAI's configs: # @ % $."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from tiny_run import TINY

NAMES = ["@anon", "%pct", "$cash", "site#4", "import", "a::b"]


def test_a_data_set_of_odd_names_is_trained_scored_and_predicted(phantoms: Path, tmp_path: Path, medseg) -> None:
    data, run = tmp_path / "hearts #2 @home", tmp_path / "run #1"
    listed = json.loads((phantoms / "dataset.json").read_text())
    items = []
    for name, item in zip(NAMES, listed["training"], strict=True):
        for key in ("image", "label"):
            target = data / f"{key}sTr" / f"{name}.nii.gz"
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(phantoms / item[key], target)
        items.append({k: f"{k}sTr/{name}.nii.gz" for k in ("image", "label")})
    (data / "dataset.json").write_text(json.dumps({**listed, "training": items, "test": []}))

    given = [part for key, value in TINY for part in ("--set", f"{key}={value}")]
    code, _, told = medseg("plan", data, "--out", run, "--epochs", 1, "--validation", 0, *given)
    assert code == 0, told
    code, _, told = medseg("train", data, "--out", run)
    assert code == 0, told
    rows = json.loads((run / "eval" / "metrics.json").read_text())["rows"]
    assert {row["case"] for row in rows} == set(NAMES)
    assert {p.name for p in (run / "eval" / "predictions").iterdir()} == {f"{n}.nii.gz" for n in NAMES}

    out = tmp_path / "scores #3"
    code, _, told = medseg("evaluate", run, data, "--out", out)
    assert code == 0, told
    assert {row["case"] for row in json.loads((out / "metrics.json").read_text())["rows"]} == set(NAMES)
    code, _, told = medseg("predict", run, data / "imagesTr" / "@anon.nii.gz", "--out", tmp_path / "masks #4")
    assert code == 0, told
    assert (tmp_path / "masks #4" / "@anon.nii.gz").exists()
