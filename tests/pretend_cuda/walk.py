"""Trainings on the pretended GPU, and predictions; what came out as JSON on the last line. Run by test_pretend_cuda.py."""

from __future__ import annotations

import pretend_cuda  # noqa: F401  before torch

# ruff: isort: split
import csv
import json
import sys
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import torch
from tiny_run import TINY

from medseg_supcon.bundle import load_tensors
from medseg_supcon.datasets import make_phantoms, read_dataset, split_cases
from medseg_supcon.inference import Predictor
from medseg_supcon.training import prepare_run, run_config


def trained(folder: Path, recipe: str, device: str, more: list[tuple[str, Any]], epochs: int = 1) -> list[float]:
    """Train a tiny run; its losses, epoch by epoch."""
    dataset = read_dataset(folder / "data")
    split = split_cases(dataset, labels=3 if recipe == "semi" else None)
    settings = [*TINY, ("plan::steps_per_epoch", 2), ("plan::batch_size", 2), ("num_workers", 0), *more]
    run = folder / f"{recipe}_{device.replace(':', '')}"
    prepare_run(dataset, split, run, recipe=recipe, settings=settings, epochs=epochs, device=device)
    run_config(run, device=device, quiet=True)
    with (run / "logs" / "history.csv").open(newline="") as stream:
        return [float(row["loss"]) for row in csv.DictReader(stream)]


def resumed(run: Path) -> list[str]:
    """One more epoch of a run; where AdamW's step counts were in it."""
    plan = run / "configs" / "plan.json"
    plan.write_text(json.dumps({**json.loads(plan.read_text()), "epochs": 2}))
    run_config(run, device="cuda", quiet=True, resume=True)
    saved = torch.load(run / "models" / "checkpoint.pt", weights_only=True)
    return sorted({str(state["step"].device) for state in saved["state"]["optimizer"]["state"].values()})


def main(folder: Path) -> dict[str, Any]:
    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    try:
        torch.ones(2, device="cuda") + torch.ones(2)
    except RuntimeError as error:
        found["two devices"] = str(error)
    make_phantoms(folder / "data", cases=4, unseen=1, size=24.0)
    exact = [("amp", False)]
    found["joint on cpu"] = trained(folder, "joint", "cpu", exact)
    found["joint"] = trained(folder, "joint", "cuda", exact)
    found["joint, second GPU"] = trained(folder, "joint", "cuda:1", [("amp_dtype", "float16"), ("channels_last", True)])
    found["semi"] = trained(folder, "semi", "cuda", [("unlabelled_from", 0.0)])
    article = [
        ("positives", "same_voxel"),
        ("denominator", "same_class"),
        ("keys", "other_view"),
        ("within_scan", True),
    ]
    found["two_stage"] = trained(folder, "two_stage", "cuda", article, epochs=3)
    run = folder / "joint_cuda"
    found["steps"] = resumed(run)
    found["checkpoint on a CPU"] = load_tensors(run / "models" / "checkpoint.pt")["epoch"]
    scan = folder / "scan.nii.gz"
    nibabel.load(next((folder / "data" / "imagesTs").glob("*.nii.gz"))).slicer[:26, :22, :20].to_filename(scan)
    masks = [Predictor(run, device=device, amp=False).predict(scan).mask for device in ("cpu", "cuda", "cuda:1")]
    found["masks differ in"] = [int(np.count_nonzero(mask != masks[0])) for mask in masks[1:]]
    return found


if __name__ == "__main__":
    sys.stdout.write("\n" + json.dumps(main(Path(sys.argv[1]))))
