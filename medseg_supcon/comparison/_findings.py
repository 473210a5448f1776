"""From finished runs to tables, pictures and the report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from medseg_supcon.comparison._cell import CLEAN, TRAINING
from medseg_supcon.comparison._collect import draw_example, read_history, read_results, read_runs
from medseg_supcon.comparison._design import Design
from medseg_supcon.comparison._runs import unequal_recipes
from medseg_supcon.comparison._variants import level_settings
from medseg_supcon.evaluation import compare_recipes, write_comparison, write_grid
from medseg_supcon.files import write_csv
from medseg_supcon.training import describe_recipe, read_recipe

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
