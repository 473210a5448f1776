"""evaluate.yaml scores a run's validation cases in their own grids, with inference.yaml's own pipeline."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from monai.bundle import ConfigWorkflow
from toy_runs import blobs, save_nifti, threshold_weights, write_run

from medseg_supcon.evaluation import evaluate_folders
from medseg_supcon.inference import Predictor

AFFINE = np.array([[0, 1.3, 0, 2], [-0.9, 0, 0, 3], [0, 0, 2.0, 4], [0, 0, 0, 1]])


def evaluate(run: Path, **overrides: Any) -> tuple[float, dict[str, Any]]:
    config = str(run / "configs" / "evaluate.yaml")
    workflow = ConfigWorkflow(config, workflow_type="infer", logging_file=False, bundle_root=str(run), **overrides)
    workflow.initialize()
    assert workflow.check_properties() == []
    workflow.run()
    out = Path(overrides.get("output_dir", run / "eval"))
    return workflow.evaluator.state.metrics["mean_dice"], json.loads((out / "metrics.json").read_text())


@pytest.fixture
def case(tmp_path: Path) -> tuple[Path, Path]:
    """A run with two validation cases that are partly annotated."""
    run, data, items = write_run(tmp_path / "run", threshold_weights(), ignore_label=9), tmp_path / "data", []
    for seed, name in enumerate(("x", "y")):
        scan = blobs((16, 14, 10), seed)
        label = np.where(scan > 1.9, 255, np.where(scan > 1.1, 4, 0)).astype(np.int16)
        label[:3] = 9
        save_nifti(data / f"{name}_image.nii.gz", scan, AFFINE)
        save_nifti(data / f"{name}_label.nii.gz", label, AFFINE)
        items.append({"name": name, "image": f"{name}_image.nii.gz", "label": f"{name}_label.nii.gz"})
    lists = {"training": [], "validation": items, "unlabelled": []}
    (run / "configs" / "datalist.json").write_text(json.dumps(lists))
    return run, data


def test_scores_are_those_of_the_masks(case: tuple[Path, Path], tmp_path: Path) -> None:
    run, data = case
    mean, report = evaluate(run, dataset_dir=str(data))
    assert 0.5 < mean < 1
    assert mean == pytest.approx(report["summary"]["mean"]["dice"])
    # The masks that it leaves are the predictor's, and score the same on their own.
    for name in ("x", "y"):
        mask = np.asarray(nib.load(run / "eval" / "predictions" / f"{name}.nii.gz").dataobj)
        ours = Predictor(run, device="cpu").predict(data / f"{name}_image.nii.gz").mask
        assert (mask != ours).sum() <= 2
        save_nifti(
            tmp_path / "labels" / f"{name}.nii",
            np.asarray(nib.load(data / f"{name}_label.nii.gz").dataobj),
            AFFINE,
        )
    labels = {"background": 0, "organ": 4, "lesion": 255}
    again = evaluate_folders(run / "eval" / "predictions", tmp_path / "labels", labels, ignore_label=9)
    for ours, theirs in zip(report["rows"], again["rows"], strict=True):
        assert ours == pytest.approx(theirs)


def test_other_cases_and_another_folder(case: tuple[Path, Path], tmp_path: Path) -> None:
    run, data = case
    items = [{"name": "only", "image": [str(data / "y_image.nii.gz")], "label": str(data / "y_label.nii.gz")}]
    _, report = evaluate(run, datalist=items, output_dir=str(tmp_path / "elsewhere"))
    assert {row["case"] for row in report["rows"]} == {"only"}
    assert (tmp_path / "elsewhere" / "predictions" / "only.nii.gz").is_file()
    assert not (run / "eval").exists()


def test_no_case_is_an_error(case: tuple[Path, Path]) -> None:
    with pytest.raises(RuntimeError) as error:
        evaluate(case[0], datalist=[])
    assert "list of cases is empty" in str(error.value.__cause__)
