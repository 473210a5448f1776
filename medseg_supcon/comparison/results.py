"""From finished runs to tables: scores, costs and histories of the runs, and the table of a grid."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medseg_supcon.bundle import describe_recipe, read_recipe
from medseg_supcon.comparison.cell import CLEAN, NUMBERS, TRAINING, read_cost, read_scores, scores_folder
from medseg_supcon.comparison.design import Cell, Design
from medseg_supcon.comparison.runs import unequal_recipes
from medseg_supcon.comparison.statistics import MEAN, compare_recipes, recipe_means
from medseg_supcon.errors import RunError
from medseg_supcon.evaluation import overlay_figure, summarise
from medseg_supcon.files import read_json
from medseg_supcon.training import is_finished

Row = dict[str, Any]
Means = Mapping[tuple[str, str, int], float | None]  # by variant, recipe and label budget
MOST_EXAMPLES = 4
RUN_SCORES = ("contrastive_loss", "training_dice", "validation_dice", "test_dice")


@dataclass(frozen=True)
class Results:
    """Everything that a report is made of; rows start with the run's key: ``recipe``, ``labels``, ``seed``, ``variant``."""

    about: Row  # what was compared, as JSON values
    scores: Mapping[str, Sequence[Row]]  # condition (``clean`` first) -> a row per run, test case and class
    runs: Sequence[Row]  # a row per run: what it cost and how it ended
    histories: Sequence[Row]  # a row per run, with ``history``: the rows of its history.csv, as numbers
    examples: Sequence[tuple[str, str]] = ()  # caption and PNG (below ``pictures``) of a test scan


def read_results(
    design: Design, out: Path, plan: Row, jobs: Mapping[Path, Cell], settings: Sequence[tuple[str, Any]]
) -> Results:
    """The results of a comparison whose runs are all finished and tested; ``plan`` is the smallest budget's."""
    scores: dict[str, list[Row]] = {}
    runs, histories = [], []
    for path, cell in jobs.items():
        job, run = read_json(path), out / "runs" / cell.name
        rows = {condition: _scores(job, condition, cell) for condition in job["conditions"]}
        history = read_history(run)
        histories.append(cell.key | {"history": history})
        runs.append(cell.key | _run_row(history, rows) | read_cost(out / "tests" / cell.name))
        runs[-1]["finished"] = is_finished(run)
        if TRAINING in rows:
            runs[-1]["training_dice"] = summarise(rows.pop(TRAINING))["mean"]["dice"]
        for condition, mine in rows.items():
            scores.setdefault(condition, []).extend(mine)
    examples = [] if design.axes else _draw_examples(design, out, scores[CLEAN])
    return Results(_about(design, plan, settings), scores, runs, histories, examples)


def _scores(job: Row, condition: str, cell: Cell) -> list[Row]:
    rows = read_scores(job, condition)
    if rows is None:
        raise RunError(f"{scores_folder(Path(job['tests']), condition)} was changed. Give the command again.")
    return [cell.key | {key: row.get(key) for key in ("case", "class", *NUMBERS, "empty")} for row in rows]


def _run_row(history: Sequence[Row], rows: Mapping[str, Sequence[Row]]) -> Row:
    """``test_*``: mean over classes; validation Dice and losses: of the last epoch that has one."""
    test = summarise(rows[CLEAN])["mean"]

    def last(column: str) -> float | None:
        return next((row[column] for row in reversed(history) if column in row), None)

    contrast_is_used = any(row.get("contrastive") for row in history)
    return {
        "test_dice": test["dice"],
        "test_hd95_mm": test["hd95_mm"],
        "validation_dice": last("val_mean_dice"),
        "loss": last("loss"),
        "contrastive_loss": last("contrastive") if contrast_is_used else None,
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
        if history and all({"epoch", "step", "seconds"} <= set(row) for row in history):
            return history
        problem = "it lacks an epoch, step or seconds"
    except (OSError, ValueError, TypeError, csv.Error) as error:
        problem = str(error)
    raise RunError(f"{path} is damaged ({problem}). Delete {run} to train this run again.")


def _draw_examples(design: Design, out: Path, results: Sequence[Row]) -> list[tuple[str, str]]:
    """The test scan of median Dice under the baseline, with the mask of each recipe's first run of the largest budget."""
    budget, seed, baseline = max(design.splits), design.seeds[0], design.recipes[0]
    dice: dict[tuple[str, str], list[float]] = {}
    for row in results:
        if (row["labels"], row["seed"]) == (budget, seed) and row["dice"] is not None:
            dice.setdefault((row["recipe"], row["case"]), []).append(row["dice"])
    score = {key: sum(values) / len(values) for key, values in dice.items()}
    scored = [case for case in design.test if (baseline, case.name) in score]
    ranked = sorted(scored, key=lambda case: score[baseline, case.name])
    examples = []
    for recipe in list(dict.fromkeys(design.recipes))[:MOST_EXAMPLES] if ranked else ():
        case = ranked[len(ranked) // 2]
        tests = scores_folder(out / "tests" / Cell(recipe, budget, seed).name, CLEAN)
        mask, picture = tests / "predictions" / f"{case.name}.nii.gz", f"examples/{recipe}.png"
        if mask.exists() and (recipe, case.name) in score:
            overlay_figure(case.images[0], case.label, mask, out / "pictures" / picture, design.dataset.labels)
            dice_of_case = f"Dice {score[recipe, case.name]:.3f}"
            examples.append((f"{recipe}, {budget} labels, seed {seed}: {case.name}, {dice_of_case}", picture))
    return examples


def _about(design: Design, plan: Row, settings: Sequence[tuple[str, Any]]) -> Row:
    parts = ("training", "validation", "unlabelled")
    return {
        "dataset": design.dataset.name,
        "classes": list(design.dataset.labels)[1:],
        "recipes": list(design.recipes),
        "overlays": {name: {**read_recipe(f), **design.own.get(name, {})} for name, f in design.files.items()},
        "descriptions": {name: describe_recipe(file) for name, file in design.files.items()},
        "variants": [
            {"name": v.name, "levels": dict(v.levels), "settings": dict(v.settings)} for v in design.variants
        ],
        "axes": design.axes,
        "settings": [f"{key}={value}" for key, value in settings],
        "patch_size": plan["patch_size"],
        "seeds": list(design.seeds),
        "splits": {
            labels: {part: [case.name for case in getattr(split, part)] for part in parts}
            for labels, split in design.splits.items()
        },
        "test": [case.name for case in design.test],
        "tested_on": design.tested_on,
        "epochs": plan["epochs"],
        "steps": plan["epochs"] * plan["steps_per_epoch"],
        "patches_per_step": 2 * plan["batch_size"],
        "warnings": [*unequal_recipes(design), *(w for s in design.splits.values() for w in s.warnings)],
    }  # fmt: skip


def means_of_tests(results: Sequence[Row]) -> Means:
    """Mean test Dice of each variant and recipe, over the same classes and cases for all of them."""
    rows = [row | {"recipe": (row["variant"], row["recipe"])} for row in results]
    arms = list(dict.fromkeys(row["recipe"] for row in rows))
    means = [row for row in recipe_means(rows, arms) if row["class"] == MEAN]
    return {(*row["recipe"], row["labels"]): row["dice"] for row in means}


def grid_table(variants: Sequence[Row], recipes: Sequence[str], runs: Sequence[Row], tested: Means) -> list[Row]:
    """A row per label budget and variant: its levels, and each recipe's scores, means over seeds.

    Rows ``labels``, ``variant``, ``levels`` (axis -> level), and ``of``: recipe -> score of `RUN_SCORES` -> value or None.
    """
    table = []
    for labels in sorted({run["labels"] for run in runs}):
        for variant in variants:
            of = {}
            for recipe in dict.fromkeys(recipes):
                key = (variant["name"], recipe, labels)
                mine = [run for run in runs if (run["variant"], run["recipe"], run["labels"]) == key]
                of[recipe] = {score: _mean([run.get(score) for run in mine]) for score in RUN_SCORES[:-1]}
                of[recipe]["test_dice"] = tested[key]
            table.append({"labels": labels, "variant": variant["name"], "levels": variant["levels"], "of": of})
    return table


def level_means(table: Sequence[Row], recipes: Sequence[str]) -> list[Row]:
    """What each setting does: every recipe's mean test Dice over all variants with one level, per label budget."""
    groups: dict[tuple[int, str, str], list[Row]] = {}
    for axis in table[0]["levels"]:
        for row in table:
            groups.setdefault((row["labels"], axis, row["levels"][axis]), []).append(row["of"])
    return [
        {"labels": labels, "axis": axis, "level": level, "variants": len(rows)}
        | {"of": {r: _mean([of[r]["test_dice"] for of in rows]) for r in dict.fromkeys(recipes)}}
        for (labels, axis, level), rows in sorted(groups.items(), key=lambda group: group[0][0])
    ]  # fmt: skip


def best_variants(table: Sequence[Row], recipes: Sequence[str], results: Sequence[Row]) -> list[Row]:
    """Each recipe at its best variant by validation Dice against the baseline at its own, as `compare_recipes`; or none."""
    best: list[Row] = []
    for labels in sorted({row["labels"] for row in table}):
        chosen = {}
        for recipe in dict.fromkeys(recipes):
            scored = [
                (row["of"][recipe]["validation_dice"], row["variant"]) for row in table if row["labels"] == labels
            ]
            scored = [pair for pair in scored if pair[0] is not None]
            if not scored:
                return []
            chosen[recipe] = max(scored, key=lambda pair: pair[0])[1]
        rows = [r for r in results if r["labels"] == labels and r["variant"] == chosen.get(r["recipe"])]
        best += [
            {"variant": chosen[row["recipe"]], "baseline_variant": chosen[recipes[0]]} | row
            for row in compare_recipes(rows, recipes)
            if row["class"] == MEAN
        ]
    return best


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
