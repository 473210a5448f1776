"""A grid of variants for a person: the table, its reading, and one HTML page with its pictures inside."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from medseg_supcon import __version__
from medseg_supcon.evaluation._compare_report import caveats, cost_sentence, costs_of
from medseg_supcon.evaluation._comparison import LEFT_OUT_RULE, MEAN
from medseg_supcon.evaluation._grid import (
    SCORES,
    Means,
    best_variants,
    flat,
    grid_answers,
    grid_differences,
    grid_table,
    level_means,
    means_of_tests,
)
from medseg_supcon.evaluation._grid_figures import grid_curves_figure, grid_figure
from medseg_supcon.evaluation._render import inline, render, settings_and_wiring, write_csv
from medseg_supcon.evaluation._summary import EMPTY_RULE

Row = dict[str, Any]
TITLES = {  # name in full, head of a narrow column
    "contrastive_loss": ("contrastive loss", "loss"),
    "training_dice": ("training Dice", "train"),
    "validation_dice": ("validation Dice", "valid."),
    "test_dice": ("test Dice", "test"),
}


def write_grid(
    out: Path,
    about: Mapping[str, Any],
    results: Mapping[str, Sequence[Row]],
    runs: Sequence[Row],
    curves: Sequence[Row],
) -> dict[str, Any]:
    """Write ``grid.csv``, ``differences.csv``, ``summary.md``, ``pictures/`` and ``report.html``.

    Args:
        out: the comparison's folder.
        about: as of `write_comparison`, with ``variants`` (``name`` and ``levels`` of each) and ``axes`` (axis ->
            level -> settings).
        results: condition (``clean`` first) -> a row per run, test case and class, with ``variant``.
        runs: a row per run, with its cost.
        curves: a row per run: ``variant``, ``recipe``, ``labels``, ``history``.

    Returns:
        everything the report says, as JSON values.
    """
    recipes, variants = list(about["recipes"]), about["variants"]
    unique = list(dict.fromkeys(recipes))
    clean = results["clean"]
    tested = {condition: means_of_tests(variants, unique, rows) for condition, rows in results.items()}
    table = grid_table(variants, recipes, runs, tested["clean"])
    differences = grid_differences(variants, recipes, clean)
    best = best_variants(table, recipes, clean)
    pictures = out / "pictures"
    grid_figure(table, recipes, pictures / "grid.png")
    grid_curves_figure(curves, variants, recipes, pictures / "grid_curves.png")
    write_csv(flat(table, differences), out / "grid.csv")
    write_csv(differences, out / "differences.csv")
    costs = costs_of(runs, recipes)
    found: dict[str, Any] = {
        "about": dict(about),
        "answers": grid_answers(differences, best),
        "caveats": caveats(about, differences),
        "table": table,
        "differences": differences,
        "best": best,
        "level_means": level_means(table, recipes),
        "robustness": _robustness(table, tested, unique),
        "costs": costs,
        "runs": list(runs),
        "version": __version__,
    }
    memory = [c["memory_gib"] for c in costs if c["memory_gib"] is not None]
    scores = {r: [s for s in SCORES if any(row["of"][r][s] is not None for row in table)] for r in unique}
    view = {
        **found,
        "axes": about["axes"],
        "level_settings": [
            (axis, level, settings)
            for axis, levels in about["axes"].items()
            for level, settings in levels.items()
        ],
        "budgets": len({row["labels"] for row in table}),
        "scores": scores,
        "titles": TITLES,
        "best_scores": {
            r: {s: _best(s, [row["of"][r][s] for row in table]) for s in scores[r]} for r in unique
        },
        "paired": [_paired(row, differences, unique[1:]) for row in table],
        "conditions": [c for c in results if c != "clean"],
        "cost": cost_sentence(costs),
        "memory": max(memory) if memory else None,
        "machines": ", ".join(dict.fromkeys(c["machine"] for c in costs if c["machine"])),
        "split_overlays": {name: settings_and_wiring(o) for name, o in about["overlays"].items()},
        "rules": [LEFT_OUT_RULE, EMPTY_RULE],
        "images": {name: inline(pictures / f"{name}.png") for name in ("grid", "grid_curves")},
    }
    (out / "report.html").write_text(render("grid.html.j2", view), encoding="utf-8")
    (out / "summary.md").write_text(render("grid.md.j2", view), encoding="utf-8")
    return found


def _best(score: str, values: Sequence[float | None]) -> float | None:
    """The best of a column; losses of different settings are not told good from bad."""
    known = [value for value in values if value is not None]
    return max(known) if known and score != "contrastive_loss" else None


def _paired(row: Row, differences: Sequence[Row], recipes: Sequence[str]) -> list[Row]:
    keys = [{"variant": row["variant"], "labels": row["labels"], "recipe": r, "class": MEAN} for r in recipes]
    return [next(d for d in differences if all(d[k] == v for k, v in key.items())) for key in keys]


def _robustness(table: Sequence[Row], tested: Mapping[str, Means], recipes: Sequence[str]) -> list[Row]:
    """Mean Dice under every condition, of each variant and recipe; none where there is one condition."""
    if len(tested) < 2:
        return []
    found = []
    for row in table:
        for recipe in recipes:
            key = row["variant"], recipe, row["labels"]
            means = {condition: of[key] for condition, of in tested.items()}
            found.append(
                dict(zip(("variant", "recipe", "labels"), key, strict=True))
                | {"levels": row["levels"]}
                | means
            )
    return found
