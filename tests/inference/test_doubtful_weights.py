"""Weights and outputs that are not numbers, an interrupted training, and cases that the run was trained on."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from toy_runs import blobs, save_nifti, threshold_weights

from medseg_supcon.bundle import load_tensors
from medseg_supcon.datasets import read_dataset
from medseg_supcon.errors import RunError
from medseg_supcon.inference import Predictor, evaluate_dataset


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite_are_refused(make_run: Callable[..., Path], value: float) -> None:
    weights = threshold_weights()
    weights["bias"][1] = value
    good, bad = make_run("good", weights=threshold_weights()), make_run("bad", weights=weights)
    for runs in (bad, [good, bad]):
        with pytest.raises(RunError, match=r"bad/models/model\.pt: bias contains NaN or infinity"):
            Predictor(runs, device="cpu")
    Predictor(good, device="cpu")


def test_a_tensor_deep_in_a_checkpoint_is_looked_at(tmp_path: Path) -> None:
    content: dict[str, Any] = {
        "epoch": 3,
        "best": float("inf"),
        "state": {"loss": [{}, {"x": torch.ones(2)}]},
    }
    torch.save(content, tmp_path / "a.pt")
    assert load_tensors(tmp_path / "a.pt")["best"] == float("inf")
    content["state"]["loss"][1]["x"][0] = torch.nan
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(RunError, match=r"state\.loss\.1\.x contains NaN"):
        load_tensors(tmp_path / "a.pt")


@pytest.mark.parametrize("tta", [False, True])
@pytest.mark.parametrize("members", [1, 2])
def test_a_scan_whose_output_is_nan_fails_alone(
    make_run: Callable[..., Path], tmp_path: Path, members: int, tta: bool
) -> None:
    """Intensities of 1e38 times a weight of 20 are more than float32 holds."""
    runs = [make_run(f"run{i}", weights=threshold_weights()) for i in range(members)]
    save_nifti(tmp_path / "in" / "a.nii", blobs((9, 8, 7)))
    scan = blobs((9, 8, 7))
    scan[4, 4, 4] = 1e38
    save_nifti(tmp_path / "in" / "b.nii", scan)
    entries = Predictor(runs, device="cpu", tta=tta).run([tmp_path / "in"], tmp_path / "out")["scans"]
    assert [entry["status"] for entry in sorted(entries, key=lambda e: e["name"])] == ["done", "failed"]
    (failed,) = [entry for entry in entries if entry["status"] == "failed"]
    assert "contains NaN or infinity" in failed["error"] and failed["error"].startswith("b: ")
    assert not (tmp_path / "out" / "b.nii.gz").exists()


@pytest.mark.parametrize(
    ("checkpoint", "said"),
    [
        ({"finished": False, "epoch": 3, "max_epochs": 40}, True),
        ({"finished": True, "epoch": 40, "max_epochs": 40}, False),
        ({"weights": 1}, False),
        (b"damaged", False),
        (None, False),
    ],
    ids=str,
)
def test_an_interrupted_training_is_said(threshold_run: Path, tmp_path: Path, checkpoint: Any, said: bool) -> None:
    file = threshold_run / "models" / "checkpoint.pt"
    if isinstance(checkpoint, bytes):
        file.write_bytes(checkpoint)
    elif checkpoint is not None:
        torch.save(checkpoint, file)
    scan = save_nifti(tmp_path / "a.nii", blobs((6, 5, 4)))
    manifest = Predictor(threshold_run, device="cpu").run([scan], tmp_path / "out")
    assert [("after 3 of 40 epochs" in warning) for warning in manifest["warnings"]] == [True] * said
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["warnings"] == manifest["warnings"]


def test_cases_that_the_run_was_trained_on_are_marked(trained_run: Path, phantoms: Path, tmp_path: Path) -> None:
    lists = json.loads((trained_run / "configs" / "datalist.json").read_text())
    training = {item["name"] for item in lists["training"]}
    moved = Path(shutil.copytree(phantoms, tmp_path / "moved"))
    renamed = Path(shutil.copytree(phantoms, tmp_path / "renamed"))
    listing = json.loads((renamed / "dataset.json").read_text()) | {"name": "Other"}
    (renamed / "dataset.json").write_text(json.dumps(listing))
    for folder, seen in ((phantoms, training), (moved, training), (renamed, set())):
        out = tmp_path / f"out_{folder.name}"
        report = evaluate_dataset(trained_run, read_dataset(folder), out, device="cpu")
        assert {row["case"] for row in report["rows"] if row["trained_on"]} == seen
        with (out / "metrics.csv").open(newline="") as stream:
            rows = list(csv.DictReader(stream))
        assert {row["case"] for row in rows if row["trained_on"] == "True"} == seen
        assert {row["trained_on"] for row in rows} <= {"True", "False"}
