"""One run of a comparison: train it, or go on with it, and test it under every condition."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from medseg_supcon.bundle import is_planned, read_config
from medseg_supcon.datasets import load_items
from medseg_supcon.errors import RunError
from medseg_supcon.files import read_json, write_text
from medseg_supcon.inference import Predictor, evaluate_items
from medseg_supcon.training import is_complete, machine_name, peak_memory_gib, train_run

CLEAN, TRAINING = "clean", "training scans"
NUMBERS = ("dice", "hd95_mm", "surface_dice", "volume_ml", "reference_volume_ml")
Job = Mapping[str, Any]


def run_cell(job: Job, device: str | None = None, quiet: bool = False, sharing: int = 1) -> None:
    """Do what is left to do of one run, whose configs `compare` found to be trusted; ``sharing`` runs share the memory.

    A job has ``run`` (a planned run), ``tests`` (a folder), ``dataset_dir``, ``classes`` and ``conditions``: name -> items.
    """
    run, tests = Path(job["run"]), Path(job["tests"])
    if not is_complete(run):
        where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        train_run(run, device=device, resume=True, quiet=quiet, trust=True, **_memory_share(run, sharing))
        _write_cost(tests / "cost.json", where)
    for condition, items in job["conditions"].items():
        if read_scores(job, condition) is not None:
            continue
        folder = scores_folder(tests, condition)
        (folder / "metrics.json").unlink(missing_ok=True)
        entries = load_items(items, job["dataset_dir"])
        evaluate_items(Predictor(run, device=device, trust=True), entries, folder)
        if condition != CLEAN:
            shutil.rmtree(folder / "predictions", ignore_errors=True)


def is_done(job: Job) -> bool:
    """Trained to its end, and tested under every condition on exactly these cases.

    Raises:
        RunError: the run's checkpoint is not one of a training.
    """
    try:
        complete = is_complete(Path(job["run"]))
    except (KeyError, TypeError):
        raise RunError(
            f"{job['run']}/models/checkpoint.pt is not a checkpoint of medseg. Delete {job['run']} to train it again."
        ) from None
    return complete and all(read_scores(job, condition) is not None for condition in job["conditions"])


def scores_folder(tests: Path, condition: str) -> Path:
    """The folder of a run's scores under a condition, in its folder of ``tests``."""
    return tests / condition.replace(" ", "_")


def read_scores(job: Job, condition: str) -> list[dict[str, Any]] | None:
    """The scores of the run's present weights on a condition's cases, a row per case and class.

    None if they are missing, damaged, or of other weights, cases or classes: the run is tested again.
    """
    path = scores_folder(Path(job["tests"]), condition) / "metrics.json"
    model = Path(job["run"]) / "models" / "model.pt"
    with suppress(OSError, RunError, KeyError, TypeError, ValueError):
        if path.stat().st_mtime < model.stat().st_mtime:
            return None
        rows: list[dict[str, Any]] = read_json(path)["rows"]
        wanted = {(item["name"], name) for item in job["conditions"][condition] for name in job["classes"]}
        numbers = [row[key] for row in rows for key in NUMBERS if row[key] is not None]
        if {(row["case"], row["class"]) for row in rows} == wanted and all(map(math.isfinite, numbers)):
            return rows
    return None


def read_cost(tests: Path) -> dict[str, Any]:
    """``memory_gib`` and ``machine`` of a run's training; None where the file does not say so."""
    cost: dict[str, Any] = {"memory_gib": None, "machine": None}
    with suppress(RunError, KeyError, TypeError, ValueError):
        saved = read_json(tests / "cost.json")
        cost = {"memory_gib": float(saved["memory_gib"]), "machine": str(saved["machine"])}
    return cost


def _memory_share(run: Path, sharing: int) -> dict[str, str]:
    """This process's part of the memory that the run's config lets the cache take."""
    if sharing == 1 or not is_planned(run):
        return {}
    whole = read_config(run / "configs" / "train.yaml")["memory_share"]
    return {"memory_share": f"$({str(whole).removeprefix('$')}) / {sharing}"}


def _write_cost(path: Path, device: torch.device) -> None:
    """Peak memory of this process or its GPU; of an interrupted run the larger part's."""
    memory = max(read_cost(path.parent)["memory_gib"] or 0.0, peak_memory_gib(device))
    write_text(path, json.dumps({"memory_gib": round(memory, 3), "machine": machine_name(device)}) + "\n")
