"""One run of a comparison: train it, or go on with it, and test it under every condition."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml

from medseg_supcon.bundle import is_planned
from medseg_supcon.datasets import load_items
from medseg_supcon.files import write_text
from medseg_supcon.inference import Predictor, evaluate_items
from medseg_supcon.training import is_complete, machine_name, peak_memory_gib, train_run

CLEAN, TRAINING = "clean", "training scans"
Job = Mapping[str, Any]


def run_cell(job: Job, device: str | None = None, quiet: bool = False, sharing: int = 1) -> None:
    """Do what is left to do of one run, whose configs `compare` found to be trusted.

    Args:
        job: ``run`` (a planned run), ``tests`` (folder), ``dataset_dir`` and ``conditions``: name -> items.
        device: where.
        quiet: no progress display.
        sharing: runs at once on this machine, which share its memory for cached scans.
    """
    run, tests = Path(job["run"]), Path(job["tests"])
    if not is_complete(run):
        where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        train_run(run, device=device, resume=True, quiet=quiet, trust=True, **_memory_share(run, sharing))
        _write_cost(tests / "cost.json", where)
    for condition, items in job["conditions"].items():
        folder = scores_folder(tests, condition)
        if is_tested(run, folder, items):
            continue
        (folder / "metrics.json").unlink(missing_ok=True)
        entries = load_items(items, job["dataset_dir"])
        evaluate_items(Predictor(run, device=device, trust=True), entries, folder)
        if condition != CLEAN:
            shutil.rmtree(folder / "predictions", ignore_errors=True)


def is_done(job: Job) -> bool:
    """Trained to its end, and tested under every condition on these very cases."""
    run, tests = Path(job["run"]), Path(job["tests"])
    return is_complete(run) and all(
        is_tested(run, scores_folder(tests, condition), items)
        for condition, items in job["conditions"].items()
    )


def scores_folder(tests: Path, condition: str) -> Path:
    """Where a run's scores under a condition go, below its folder in ``tests``."""
    return tests / condition.replace(" ", "_")


def is_tested(run: Path, folder: Path, items: list[dict[str, Any]]) -> bool:
    """The folder holds the scores of the run's present weights on these cases."""
    metrics, model = folder / "metrics.json", run / "models" / "model.pt"
    if not (metrics.exists() and model.exists()) or metrics.stat().st_mtime < model.stat().st_mtime:
        return False
    cases = {row["case"] for row in json.loads(metrics.read_text())["rows"]}
    return cases == {item["name"] for item in items}


def _memory_share(run: Path, sharing: int) -> dict[str, str]:
    """This process's part of what the run's config lets the cache take."""
    if sharing == 1 or not is_planned(run):
        return {}
    whole = yaml.safe_load((run / "configs" / "train.yaml").read_text())["memory_share"]
    return {"memory_share": f"$({str(whole).removeprefix('$')}) / {sharing}"}


def _write_cost(path: Path, device: torch.device) -> None:
    """Peak memory of this process or its GPU; of an interrupted run the larger part's."""
    earlier = json.loads(path.read_text())["memory_gib"] if path.exists() else 0.0
    memory = max(earlier, peak_memory_gib(device))
    write_text(path, json.dumps({"memory_gib": round(memory, 3), "machine": machine_name(device)}) + "\n")
