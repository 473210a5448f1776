"""From finished runs to tables, pictures and the report."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from medseg_supcon.bundle import describe_recipe, read_recipe
from medseg_supcon.comparison.cell import CLEAN, TRAINING, scores_folder
from medseg_supcon.comparison.design import Cell, Design, level_settings
from medseg_supcon.comparison.grid_report import write_grid
from medseg_supcon.comparison.report import write_comparison
from medseg_supcon.comparison.runs import unequal_recipes
from medseg_supcon.comparison.statistics import compare_recipes
from medseg_supcon.evaluation import overlay_figure, summarise
from medseg_supcon.files import write_csv
from medseg_supcon.training import is_finished

Row = dict[str, Any]
MOST_EXAMPLES = 4
SCORES = ("dice", "hd95_mm", "surface_dice", "volume_ml", "reference_volume_ml", "empty")


def read_results(out: Path, cells: Iterable[Cell], condition: str) -> list[Row]:
    """A row per run, case and class: the cell's key (``recipe``, ``labels``, ``seed``), ``case``, ``class``, scores."""
    rows = []
    for cell in cells:
        path = scores_folder(out / "tests" / cell.name, condition) / "metrics.json"
        for row in json.loads(path.read_text())["rows"]:
            rows.append(cell.key | {key: row[key] for key in ("case", "class", *SCORES)})
    return rows


def read_runs(
    out: Path, cells: Iterable[Cell], results: Sequence[Row], training: Sequence[Row] = ()
) -> list[Row]:
    """A row per run: what it cost and how it ended.

    ``test_dice`` and ``test_hd95_mm``: mean over classes; ``training_dice``: the same on the scans trained on, where
    ``training`` has rows of them; ``validation_dice``, ``loss`` and ``contrastive_loss``: the last epoch that has
    one; ``minutes`` of training, validations included; ``memory_gib``: the peak.
    """

    def mean(rows: Sequence[Row], cell: Cell) -> Row:
        mine = [r for r in rows if all(r[name] == value for name, value in cell.key.items())]
        of: Row = summarise(mine)["mean"]
        return of

    found = []
    for cell in cells:
        run = out / "runs" / cell.name
        test = mean(results, cell)
        history = read_history(run)
        cost_file = out / "tests" / cell.name / "cost.json"
        cost = json.loads(cost_file.read_text()) if cost_file.exists() else {}
        found.append(
            cell.key
            | {
                "test_dice": test["dice"],
                "test_hd95_mm": test["hd95_mm"],
                "validation_dice": _last(history, "val_mean_dice"),
                "loss": _last(history, "loss"),
                "contrastive_loss": _last(history, "contrastive", used_only=True),
                "epochs": len(history),
                "steps": int(history[-1]["step"]) if history else 0,
                "minutes": round(sum(float(row["seconds"]) for row in history) / 60, 2),
                "memory_gib": cost.get("memory_gib"),
                "machine": cost.get("machine"),
                "finished": is_finished(run),
            }
            | ({"training_dice": mean(training, cell)["dice"]} if training else {})
        )
    return found


def read_history(run: Path) -> list[dict[str, str]]:
    """The rows of a run's ``history.csv``."""
    with (run / "logs" / "history.csv").open(newline="") as stream:
        return list(csv.DictReader(stream))


def draw_example(design: Design, out: Path, results: Sequence[Row]) -> list[tuple[str, Path]]:
    """The test scan of median Dice under the baseline, as each recipe's first run of the largest budget masks it."""
    budget, seed = max(design.splits), design.seeds[0]
    rows = [r for r in results if (r["labels"], r["seed"]) == (budget, seed) and r["dice"] is not None]
    dice = {
        (recipe, case.name): [r["dice"] for r in rows if (r["recipe"], r["case"]) == (recipe, case.name)]
        for recipe in design.recipes
        for case in design.test
    }
    score = {key: sum(values) / len(values) for key, values in dice.items() if values}
    ranked = sorted(
        (c for c in design.test if (design.recipes[0], c.name) in score),
        key=lambda c: score[design.recipes[0], c.name],
    )
    if not ranked:
        return []
    case, found = ranked[len(ranked) // 2], []
    for recipe in list(dict.fromkeys(design.recipes))[:MOST_EXAMPLES]:
        cell = Cell(recipe, budget, seed)
        mask = scores_folder(out / "tests" / cell.name, CLEAN) / "predictions" / f"{case.name}.nii.gz"
        picture = out / "pictures" / "examples" / f"{recipe}.png"
        if mask.exists() and (recipe, case.name) in score:
            overlay_figure(case.images[0], case.label, mask, picture, design.dataset.labels)
            found.append(
                (
                    f"{recipe}, {budget} labels, seed {seed}: {case.name}, Dice {score[recipe, case.name]:.3f}",
                    picture,
                )
            )
    return found


def _last(history: Sequence[dict[str, str]], column: str, used_only: bool = False) -> float | None:
    values = [float(row[column]) for row in history if row.get(column)]
    if used_only and not any(values):  # a term that is 0 throughout is not in use
        return None
    return values[-1] if values else None


Settings = Sequence[tuple[str, Any]]


def write_findings(
    design: Design,
    out: Path,
    plan: dict[str, Any],
    conditions: Sequence[str],
    settings: Settings,
    training_score: bool,
) -> dict[str, Any]:
    """Write everything that people read; returns what ``comparison.json`` holds.

    Args:
        design: every run of it is finished and tested.
        out: folder of the comparison.
        plan: of the smallest budget.
        conditions: what the test scans went through, ``clean`` first.
        settings: of all runs.
        training_score: the runs were tested on their training scans, too.
    """
    results = {c: read_results(out, design.cells, c) for c in conditions}
    clean = results[CLEAN]
    training = read_results(out, design.cells, TRAINING) if training_score else []
    runs = read_runs(out, design.cells, clean, training)
    write_csv(out / "results.csv", list(clean[0]), clean)
    write_csv(out / "runs.csv", list(runs[0]), runs)
    if len(results) > 1:
        worse = [{"condition": c} | row for c, rows in results.items() if c != CLEAN for row in rows]
        write_csv(out / "robustness.csv", list(worse[0]), worse)
    about = _about(design, plan, settings)
    if any(variant.levels for variant in design.variants):
        curves = [cell.key | {"history": read_history(out / "runs" / cell.name)} for cell in design.cells]
        return write_grid(out, about, results, runs, curves)
    histories = {
        cell.name: (cell.recipe, cell.labels, read_history(out / "runs" / cell.name)) for cell in design.cells
    }
    robustness = [
        {"condition": condition} | row
        for condition, rows in results.items()
        if len(results) > 1
        for row in compare_recipes(rows, design.recipes)
        if row["class"] == "mean"
    ]
    examples = draw_example(design, out, clean)
    return write_comparison(out, about, clean, runs, robustness, histories, examples)


def _about(design: Design, plan: dict[str, Any], settings: Settings) -> dict[str, Any]:
    parts = ("training", "validation", "unlabelled")
    return {
        "dataset": design.dataset.name,
        "classes": list(design.dataset.labels)[1:],
        "recipes": list(design.recipes),
        "overlays": {
            name: {**read_recipe(file), **design.own.get(name, {})} for name, file in design.files.items()
        },
        "descriptions": {name: describe_recipe(file) for name, file in design.files.items()},
        "variants": [
            {"name": v.name, "levels": dict(v.levels), "settings": dict(v.settings)} for v in design.variants
        ],
        "axes": level_settings(design.variants),
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
    }
