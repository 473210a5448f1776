"""A comparison for a person: sentences, tables in Markdown and CSV, and one HTML page with its pictures inside."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from medseg_supcon import __version__
from medseg_supcon.comparison.figures import (
    Histories,
    differences_figure,
    efficiency_figure,
    learning_figure,
    robustness_figure,
)
from medseg_supcon.comparison.render import counted, inline, points, render, settings_and_wiring, write_csv
from medseg_supcon.comparison.statistics import (
    LEFT_OUT_RULE,
    MEAN,
    compare_recipes,
    recipe_means,
    too_few,
    verdict,
)
from medseg_supcon.evaluation import EMPTY_RULE

Row = dict[str, Any]
FEW_SEEDS, FEW_CASES = 3, 10


def write_comparison(
    out: Path,
    about: Mapping[str, Any],
    results: Sequence[Row],
    runs: Sequence[Row],
    robustness: Sequence[Row],
    histories: Histories,
    examples: Sequence[tuple[str, Path]] = (),
) -> dict[str, Any]:
    """Write ``summary.csv``, ``summary.md``, ``differences.csv``, ``pictures/`` and ``report.html``.

    Args:
        out: the comparison's folder.
        about: what was compared: ``dataset``, ``recipes`` (names, the baseline first), ``overlays``, ``seeds``,
            ``splits``, ``test``, ``tested_on``, ``epochs``, ``steps``, ``patches_per_step``, ``warnings``, and
            ``descriptions``: recipe -> a sentence, or an empty one.
        results: rows of `compare_recipes`.
        runs: a row per run, with its cost.
        robustness: rows of `compare_recipes` for the mean over classes, with ``condition``; may be empty.
        histories: run -> recipe, labels, rows of its ``history.csv``.
        examples: (caption, PNG) of pictures to show.

    Returns:
        everything the report says, as JSON values.
    """
    recipes = list(about["recipes"])
    means, differences = recipe_means(results, recipes), compare_recipes(results, recipes)
    costs = costs_of(runs, recipes)
    robustness = _with_losses(robustness, recipes)
    worse = on_worse_scans(robustness)
    pictures = out / "pictures"
    efficiency_figure(means, recipes, pictures / "label_efficiency.png")
    headline = [row for row in differences if row["class"] == MEAN]
    differences_figure(headline, pictures / "differences.png")
    classes = list(dict.fromkeys(row["class"] for row in means))
    if len(classes) > 2:
        differences_figure(differences, pictures / "differences_by_class.png")
    learning_figure(histories, recipes, pictures / "learning.png")
    if robustness:
        robustness_figure(robustness, recipes, pictures / "robustness.png")
    write_csv(means, out / "summary.csv")
    write_csv(differences, out / "differences.csv")
    found = {
        "about": dict(about),
        "answers": [*(answer(row) for row in headline), *worse],
        "caveats": caveats(about, differences, robustness),
        "means": means,
        "differences": differences,
        "costs": costs,
        "robustness": robustness,
        "runs": list(runs),
        "version": __version__,
    }
    view = {
        **found,
        "cost": cost_sentence(costs),
        "worse": worse,
        "classes": classes,
        "by_condition": _by_condition(robustness, recipes),
        "conditions": list(dict.fromkeys(row["condition"] for row in robustness)),
        "split_overlays": {name: settings_and_wiring(o) for name, o in about["overlays"].items()},
        "rules": [LEFT_OUT_RULE, EMPTY_RULE],
        "images": {p.stem: inline(p) for p in sorted(pictures.glob("*.png")) if p.parent == pictures},
        "examples": [(caption, inline(path)) for caption, path in examples],
    }
    (out / "report.html").write_text(render("report.html.j2", view), encoding="utf-8")
    (out / "summary.md").write_text(render("summary.md.j2", view), encoding="utf-8")
    return found


def answer(row: Row) -> str:
    """Who won, by how much and how sure, in a sentence."""
    if row["difference"] is None:
        return f"With {counted(row['labels'], 'labelled scan')}: {verdict(row)}."
    return (
        f"With {counted(row['labels'], 'labelled scan')}: {verdict(row)}. {row['recipe']} scores {row['dice']:.4f}, "
        f"{row['baseline']} {row['baseline_dice']:.4f}: {points(row['difference'])} Dice points (95 % interval "
        f"{points(row['low'])} to {points(row['high'])}, p = {row['p']:.3g}, {counted(row['cases'], 'test scan')}, "
        f"{counted(row['seeds'], 'seed')})."
    )


def on_worse_scans(robustness: Sequence[Row]) -> list[str]:
    """Where a recipe differs from the baseline on corrupted scans, a sentence for each recipe and budget.

    >>> row = {"labels": 8, "recipe": "b", "baseline": "a", "difference": 0.02, "low": 0.01, "high": 0.03}
    >>> rows = [row | {"condition": "noise", "seeds": 5}, row | {"condition": "ghosting", "seeds": 5, "low": -0.01}]
    >>> on_worse_scans(rows)[0]
    'With 8 labelled scans, on worse scans: b against a +2.00 (+1.00 to +3.00) with noise; no clear difference with ghosting.'
    """
    found = []
    groups: dict[tuple[Any, Any], list[Row]] = {}
    for row in robustness:
        if row["condition"] != "clean" and row["difference"] is not None:
            groups.setdefault((row["labels"], row["recipe"]), []).append(row)
    for (labels, recipe), rows in groups.items():
        told = [row for row in rows if row["low"] > 0 or row["high"] < 0]
        rest = ", ".join(row["condition"] for row in rows if row not in told)
        parts = [
            f"{points(row['difference'])} ({points(row['low'])} to {points(row['high'])}) with {row['condition']}"
            for row in told
        ]
        baseline, few = rows[0]["baseline"], too_few(rows[0])
        if all(row["low"] == row["high"] == 0 for row in rows):
            said = f"{recipe} and {baseline} give the same with {rest}"
        elif not told:
            said = f"no clear difference between {recipe} and {baseline} with {rest}"
        else:
            said = f"{recipe} against {baseline} {', '.join(parts)}{few and f', {few}'}"
            said += f"; no clear difference with {rest}" if rest else ""
        found.append(f"With {counted(labels, 'labelled scan')}, on worse scans: {said}.")
    return found


def caveats(
    about: Mapping[str, Any], differences: Sequence[Row], robustness: Sequence[Row] = ()
) -> list[str]:
    """What a reader must know before they believe a figure.

    Args:
        about: see `write_comparison`.
        differences: every difference that is shown, on the scans as they are.
        robustness: those shown on worse scans; rows of ``clean`` are ``differences``' and are not counted again.
    """
    found = list(dict.fromkeys(about["warnings"]))
    seeds = len(about["seeds"])
    if seeds == 1:
        found.append(
            "One seed: the intervals cover which scans were tested, not the chance of training. Another seed may "
            "turn a small difference round."
        )
    elif seeds < FEW_SEEDS:
        found.append(f"{seeds} seeds: the intervals see little of the chance of training and are too narrow.")
    if len(about["test"]) < FEW_CASES:
        found.append(
            f"{counted(len(about['test']), 'test scan')}: too few for a firm statement about other scans; with fewer than 6 "
            "the test's p cannot fall below 0.05."
        )
    plain = sum(row["class"] == MEAN and row["difference"] is not None for row in differences)
    worse = sum(row["condition"] != "clean" and row["difference"] is not None for row in robustness)
    if plain + worse > 1:
        where = f" ({plain} on the scans as they are, {worse} on worse scans)" if worse else ""
        classes = (
            "; those of single classes come on top" if len({row["class"] for row in differences}) > 2 else ""
        )
        found.append(
            f"{plain + worse} comparisons of the mean{where}{classes}: each interval is a 95 % one by itself, so one in "
            "twenty excludes 0 by chance where there is no difference."
        )
    return found


def costs_of(runs: Sequence[Row], recipes: Sequence[str]) -> list[Row]:
    """Minutes and memory of a run of each recipe, over all its runs."""
    found: list[Row] = []
    for recipe in dict.fromkeys(recipes):
        mine = [run for run in runs if run["recipe"] == recipe]
        memory = [run["memory_gib"] for run in mine if run["memory_gib"] is not None]
        minutes = sum(run["minutes"] for run in mine) / len(mine)
        steps = sum(run["steps"] for run in mine)
        found.append(
            {
                "recipe": recipe,
                "runs": len(mine),
                "minutes": round(minutes, 2),
                "seconds_per_step": 60 * sum(run["minutes"] for run in mine) / max(steps, 1),
                "relative_time": minutes / found[0]["minutes"] if found and found[0]["minutes"] else 1.0,
                "memory_gib": max(memory) if memory else None,
                "machine": ", ".join(sorted({run["machine"] for run in mine if run["machine"]})),
            }
        )
    return found


def cost_sentence(costs: Sequence[Row]) -> str:
    """Time and memory of each recipe's runs beside the baseline's.

    >>> a = {"recipe": "a", "minutes": 2.0, "relative_time": 1.0, "memory_gib": None, "machine": ""}
    >>> cost_sentence([a, {**a, "recipe": "b", "minutes": 3.0, "relative_time": 1.5, "memory_gib": 0.5}])
    'Training takes 2.0 min a run with a, 3.0 min with b (1.50 x); memory at its peak: 0.5 GiB with b.'
    """
    known = [f"{c['memory_gib']:.1f} GiB with {c['recipe']}" for c in costs if c["memory_gib"] is not None]
    memory = f"; memory at its peak: {', '.join(known)}" if known else ""
    others = [f", {c['minutes']:.1f} min with {c['recipe']} ({c['relative_time']:.2f} x)" for c in costs[1:]]
    return f"Training takes {costs[0]['minutes']:.1f} min a run with {costs[0]['recipe']}{''.join(others)}{memory}."


def _with_losses(robustness: Sequence[Row], recipes: Sequence[str]) -> list[Row]:
    """Rows by budget and recipe, each with what the corruption took from the recipe's and the baseline's Dice."""
    ordered = sorted(robustness, key=lambda row: (row["labels"], recipes.index(row["recipe"])))
    clean = {(r["recipe"], r["labels"]): r for r in ordered if r["condition"] == "clean"}
    found = []
    for row in ordered:
        whole = clean[row["recipe"], row["labels"]]
        lost = {
            f"{key}_change": None if row[key] is None or whole[key] is None else row[key] - whole[key]
            for key in ("dice", "baseline_dice")
        }
        found.append({**row, **lost})
    return found


def _by_condition(robustness: Sequence[Row], recipes: Sequence[str]) -> list[Row]:
    """A row per budget and recipe, with ``cells``, one for each condition: ``dice``, ``lost``, ``low``, ``high``."""
    found = []
    nothing = {"low": None, "high": None}
    for labels in dict.fromkeys(row["labels"] for row in robustness):
        mine = [row for row in robustness if row["labels"] == labels]
        first = [row for row in mine if row["recipe"] == mine[0]["recipe"]]
        base = [{"dice": r["baseline_dice"], "lost": r["baseline_dice_change"], **nothing} for r in first]
        found.append({"labels": labels, "recipe": recipes[0], "cells": base})
        for recipe in dict.fromkeys(recipes[1:]):
            of = [row for row in mine if row["recipe"] == recipe]
            cells = [
                {"dice": r["dice"], "lost": r["dice_change"], "low": r["low"], "high": r["high"]} for r in of
            ]
            found.append({"labels": labels, "recipe": recipe, "cells": cells})
    return found
