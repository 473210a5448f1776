"""From finished runs to tables: scores, costs and histories of the runs, and the table of a grid."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from medseg_supcon.bundle import describe_recipe, read_recipe
from medseg_supcon.comparison.cell import CLEAN, NUMBERS, TRAINING, read_cost, read_scores, scores_folder
from medseg_supcon.comparison.design import Cell, Design, case_names
from medseg_supcon.comparison.runs import unequal_recipes
from medseg_supcon.comparison.statistics import MEAN, recipe_means
from medseg_supcon.errors import RunError
from medseg_supcon.evaluation import summarise
from medseg_supcon.files import read_json
from medseg_supcon.training import is_finished

Row = dict[str, Any]
RUN_SCORES = ("contrastive_loss", "training_dice", "validation_dice", "test_dice")


@dataclass(frozen=True)
class Results:
    """Everything that a report is made of; rows start with the run's key: ``recipe``, ``labels``, ``seed``, ``variant``."""

    about: Row  # what was compared, as JSON values
    scores: Mapping[str, Sequence[Row]]  # condition (``clean`` first) -> a row per run, test case and class
    runs: Sequence[Row]  # a row per run: what it cost and how it ended
    histories: Sequence[Row]  # a row per run, with ``history``: the rows of its history.csv, as numbers


def read_results(design: Design, plan: Row, jobs: Mapping[Path, Cell], settings: Sequence[tuple[str, Any]]) -> Results:
    """The results of a comparison whose runs are all finished and tested; ``plan`` is the smallest budget's."""
    scores: dict[str, list[Row]] = {}
    runs, histories = [], []
    for path, cell in jobs.items():
        job = read_json(path)
        run, tests = Path(job["run"]), Path(job["tests"])
        rows = {}
        for condition in job["conditions"]:
            found = read_scores(job, condition)
            if found is None:
                raise RunError(f"{scores_folder(tests, condition)} was changed. Give the command again.")
            columns = ("case", "class", *NUMBERS, "empty")
            rows[condition] = [cell.key | {key: row.get(key) for key in columns} for row in found]
        history = read_history(run)
        histories.append(cell.key | {"history": history})
        runs.append(cell.key | _run_row(history, rows[CLEAN]) | read_cost(tests) | {"finished": is_finished(run)})
        if TRAINING in rows:
            runs[-1]["training_dice"] = summarise(rows.pop(TRAINING))["mean"]["dice"]
        for condition, mine in rows.items():
            scores.setdefault(condition, []).extend(mine)
    about = {
        "dataset": design.dataset.name,
        "classes": list(design.dataset.labels)[1:],
        "recipes": list(design.recipes),
        "overlays": {name: {**read_recipe(f), **design.own.get(name, {})} for name, f in design.files.items()},
        "descriptions": {name: describe_recipe(file) for name, file in design.files.items()},
        "variants": [{"name": v.name, "levels": dict(v.levels), "settings": dict(v.settings)} for v in design.variants],
        "axes": design.axes,
        "settings": [f"{key}={value}" for key, value in settings],
        "patch_size": plan["patch_size"],
        "seeds": list(design.seeds),
        "splits": {labels: case_names(split) for labels, split in design.splits.items()},
        "test": [case.name for case in design.test],
        "tested_on": design.tested_on,
        "epochs": plan["epochs"],
        "steps": plan["epochs"] * plan["steps_per_epoch"],
        "patches_per_step": 2 * plan["batch_size"],
        "warnings": [*unequal_recipes(design), *(w for s in design.splits.values() for w in s.warnings)],
    }
    return Results(about, scores, runs, histories)


def _run_row(history: Sequence[Row], clean: Sequence[Row]) -> Row:
    """``test_*``: mean over classes; validation Dice and losses: of the last epoch that has one."""
    test, last = summarise(clean)["mean"], {key: value for row in history for key, value in row.items()}
    return {
        "test_dice": test["dice"],
        "test_hd95_mm": test["hd95_mm"],
        "validation_dice": last.get("val_mean_dice"),
        "loss": last.get("loss"),
        "contrastive_loss": last.get("contrastive") if any(row.get("contrastive") for row in history) else None,
        "epochs": len(history),
        "steps": int(history[-1]["step"]),
        "minutes": round(sum(row["seconds"] for row in history) / 60, 2),
    }


def read_history(run: Path) -> list[dict[str, float]]:
    """The rows of a run's ``history.csv`` without empty and infinite values; a `RunError` if it is missing or damaged."""
    path = run / "logs" / "history.csv"
    try:
        with path.open(newline="", encoding="utf-8") as stream:
            rows = [{k: float(v) for k, v in row.items() if v and k != "stage"} for row in csv.DictReader(stream)]
        history = [{k: v for k, v in row.items() if math.isfinite(v)} for row in rows]
        if not history or any({"epoch", "step", "seconds"} - set(row) for row in history):
            raise ValueError("it lacks an epoch, step or seconds")
    except (OSError, ValueError, TypeError, csv.Error) as error:
        raise RunError(f"{path} is damaged ({error}). Delete {run} to train this run again.") from None
    return history


def means_of_tests(results: Sequence[Row]) -> dict[tuple[str, str, int], float | None]:
    """Mean test Dice of each (variant, recipe, label budget), over the same classes and cases for all of them."""
    rows = [row | {"recipe": (row["variant"], row["recipe"])} for row in results]
    means = recipe_means(rows, list(dict.fromkeys(row["recipe"] for row in rows)))
    return {(*row["recipe"], row["labels"]): row["dice"] for row in means if row["class"] == MEAN}


def grid_table(
    variants: Sequence[Row], recipes: Sequence[str], runs: Sequence[Row], tested: Mapping[Any, float | None]
) -> list[Row]:
    """A row per label budget and variant; its ``of`` has recipe -> score of `RUN_SCORES` -> mean over seeds, or None."""
    table = []
    for labels in sorted({run["labels"] for run in runs}):
        for variant in variants:
            of: Row = {}
            for recipe in dict.fromkeys(recipes):
                key = (variant["name"], recipe, labels)
                mine = [run for run in runs if (run["variant"], run["recipe"], run["labels"]) == key]
                known = {score: [run[score] for run in mine if run.get(score) is not None] for score in RUN_SCORES}
                of[recipe] = {score: fmean(values) if values else None for score, values in known.items()}
                of[recipe]["test_dice"] = tested[key]
            table.append({"labels": labels, "variant": variant["name"], "levels": variant["levels"], "of": of})
    return table
