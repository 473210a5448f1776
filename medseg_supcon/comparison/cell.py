"""One run of a comparison, in a process of its own: train it, or go on with it, and test it under every condition."""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import shutil
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from threading import Thread
from time import sleep
from typing import Any

import torch

from medseg_supcon.bundle import is_planned, read_config
from medseg_supcon.datasets import load_items
from medseg_supcon.errors import MedsegError, RunError
from medseg_supcon.files import read_json, write_text
from medseg_supcon.inference import Predictor, evaluate_items
from medseg_supcon.training import is_complete, machine_name, peak_memory_gib, train_run

CLEAN, TRAINING = "clean", "training scans"
NUMBERS = ("dice", "hd95_mm", "surface_dice", "volume_ml", "reference_volume_ml")
Job = Mapping[str, Any]


def main() -> int:
    """The program ``JOB.json [--device D] [--quiet]``: exit code 0, or 2 with a sentence on stderr."""
    parser = argparse.ArgumentParser(prog="medseg_supcon.comparison")
    parser.add_argument("job", type=Path)
    parser.add_argument("--device")
    parser.add_argument("--quiet", action="store_true")
    parser.add_argument("--beside", type=int, default=0, help="number of other such processes on this machine")
    parser.add_argument("--parent", type=int, required=True, help="process whose end also ends this one")
    options = parser.parse_args()
    Thread(target=_end_with, args=(options.parent,), daemon=True).start()
    logging.captureWarnings(True)
    logging.disable(logging.WARNING)  # those of third parties are not for a person at a terminal
    try:
        run_cell(read_json(options.job), options.device, options.quiet, 1 + options.beside)
    except MedsegError as error:
        sys.stderr.write(f"medseg: {error}\n")
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def _end_with(parent: int) -> None:
    """Ends this process if the comparison was killed, so that it does not train beside the next call."""
    while os.getppid() == parent:
        sleep(0.5)
    os._exit(130)


def run_cell(job: Job, device: str | None = None, quiet: bool = False, sharing: int = 1) -> None:
    """Do what is left of one run, whose configs `compare` found to be trusted; ``sharing`` runs share the memory.

    A job has ``run`` (a planned run), ``tests`` (a folder), ``dataset_dir``, ``classes`` and ``conditions``: name -> items.
    """
    run, tests = Path(job["run"]), Path(job["tests"])
    if not is_complete(run):
        where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        train_run(run, device=device, resume=True, quiet=quiet, trust=True, **_memory_share(run, sharing))
        # of an interrupted run the larger part's
        memory = max(read_cost(tests)["memory_gib"] or 0.0, peak_memory_gib(where))
        cost = {"memory_gib": round(memory, 3), "machine": machine_name(where)}
        write_text(tests / "cost.json", json.dumps(cost) + "\n")
    for condition, items in job["conditions"].items():
        if read_scores(job, condition) is None:
            folder = scores_folder(tests, condition)
            (folder / "metrics.json").unlink(missing_ok=True)
            evaluate_items(Predictor(run, device=device, trust=True), load_items(items, job["dataset_dir"]), folder)
            if condition != CLEAN:
                shutil.rmtree(folder / "predictions", ignore_errors=True)


def is_done(job: Job) -> bool:
    """Trained to its end, and tested under every condition on exactly these cases."""
    run = Path(job["run"])
    try:
        complete = is_complete(run)
    except (KeyError, TypeError):
        raise RunError(
            f"{run}/models/checkpoint.pt is not a checkpoint of medseg. Delete {run} to train again."
        ) from None
    return complete and all(read_scores(job, condition) is not None for condition in job["conditions"])


def scores_folder(tests: Path, condition: str) -> Path:
    """The folder of a run's scores under a condition."""
    return tests / condition.replace(" ", "_")


def read_scores(job: Job, condition: str) -> list[dict[str, Any]] | None:
    """A row per case and class; None if missing, damaged, or of other weights, cases or classes than the run's now."""
    path = scores_folder(Path(job["tests"]), condition) / "metrics.json"
    with suppress(OSError, RunError, KeyError, TypeError, ValueError):
        if path.stat().st_mtime < (Path(job["run"]) / "models" / "model.pt").stat().st_mtime:
            return None
        rows: list[dict[str, Any]] = read_json(path)["rows"]
        wanted = {(item["name"], name) for item in job["conditions"][condition] for name in job["classes"]}
        numbers = [row[key] for row in rows for key in NUMBERS if row[key] is not None]
        if {(row["case"], row["class"]) for row in rows} == wanted and all(map(math.isfinite, numbers)):
            return rows
    return None


def read_cost(tests: Path) -> dict[str, Any]:
    """``memory_gib`` (of the process or its GPU) and ``machine`` of a run's training; None where it is not known."""
    with suppress(RunError, KeyError, TypeError, ValueError):
        saved = read_json(tests / "cost.json")
        return {"memory_gib": float(saved["memory_gib"]), "machine": str(saved["machine"])}
    return {"memory_gib": None, "machine": None}


def _memory_share(run: Path, sharing: int) -> dict[str, str]:
    """This process's part of the memory that the run's config lets the cache take."""
    if sharing == 1 or not is_planned(run):
        return {}
    whole = read_config(run / "configs" / "train.yaml")["memory_share"]
    return {"memory_share": f"$({str(whole).removeprefix('$')}) / {sharing}"}
