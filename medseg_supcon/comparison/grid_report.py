"""A grid of variants for a person: the table, its reading, and one HTML page with its pictures inside."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from medseg_supcon import __version__
from medseg_supcon.comparison.figures import COLORS, MARKERS, mean_curve, recipe_colors
from medseg_supcon.comparison.grid import (
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
from medseg_supcon.comparison.render import inline, render, settings_and_wiring, write_csv
from medseg_supcon.comparison.report import caveats, cost_sentence, costs_of
from medseg_supcon.comparison.statistics import LEFT_OUT_RULE, MEAN
from medseg_supcon.evaluation import EMPTY_RULE, INK, dress, dress_epochs, legend_below, new_figure, save

CellRow = Mapping[str, Any]

LINES = ("-", "--", ":", "-.")
PANELS = (("contrastive", "contrastive loss"), ("val_mean_dice", "validation Dice"))


def grid_figure(table: Sequence[CellRow], recipes: Sequence[str], path: Path) -> None:
    """Dice of every variant at the largest budget: test large, validation hollow, training a dash."""
    from matplotlib.lines import Line2D

    budget = max(row["labels"] for row in table)
    rows = [row for row in table if row["labels"] == budget]
    colors = recipe_colors(recipes)
    figure = new_figure(max(6.0, 1.6 + 0.72 * len(rows)), 4.2)
    axis = figure.subplots()
    markers = [MARKERS[number % len(MARKERS)] for number in range(len(colors))]
    for number, (recipe, color) in enumerate(colors.items()):
        shift = 0.22 * (number - (len(colors) - 1) / 2)
        for place, row in enumerate(rows):
            of, x = row["of"][recipe], place + shift
            marks = (
                ("training_dice", {"marker": "_", "markersize": 11}),
                ("validation_dice", {"marker": markers[number], "markersize": 5, "markerfacecolor": "white"}),
                ("test_dice", {"marker": markers[number], "markersize": 8}),
            )
            for score, style in marks:
                if of[score] is not None:
                    axis.plot(x, of[score], color=color, linestyle="", **style)
    first, *others = rows[0]["levels"]
    names = ["\n".join(row["levels"][axis] for axis in others) or row["levels"][first] for row in rows]
    axis.set_xticks(range(len(rows)), names, fontsize=8)
    axis.set_xlim(-0.6, len(rows) - 0.4)
    axis.set_ylim(bottom=0)
    dress(axis, f"Dice by {', '.join(rows[0]['levels'])} ({budget} labelled scans)", "")
    axis.grid(visible=False, axis="x")
    if others:
        _groups(axis, [row["levels"][first] for row in rows])
    handles: list[Any] = [
        Line2D([], [], color=color, marker=markers[i], linestyle="", markersize=8, label=name)
        for i, (name, color) in enumerate(colors.items())
    ]
    shared: dict[str, Any] = {"color": INK, "linestyle": ""}
    handles += [
        Line2D([], [], marker="o", markersize=8, label="test", **shared),
        Line2D([], [], marker="o", markersize=5, markerfacecolor="white", label="validation", **shared),
        Line2D([], [], marker="_", markersize=11, label="training", **shared),
    ]
    legend_below(figure, handles)
    save(figure, path)


def grid_curves_figure(
    curves: Sequence[CellRow], variants: Sequence[CellRow], recipes: Sequence[str], path: Path
) -> None:
    """Contrastive loss and validation Dice by epoch: a column per level of the first axis, a colour per variant.

    Args:
        curves: a row per run: ``variant``, ``recipe``, ``labels``, ``history`` (rows of ``history.csv``).
        variants: ``name`` and ``levels`` of each.
        recipes: names, the baseline first: solid lines; the others are dashed.
        path: the PNG.
    """
    from matplotlib.lines import Line2D

    budget = max(row["labels"] for row in curves)
    trained = [int(row["epoch"]) for r in curves if r["labels"] == budget for row in r["history"]]
    first, *others = variants[0]["levels"]
    columns = list(dict.fromkeys(v["levels"][first] for v in variants)) if others else [first]
    groups = list(dict.fromkeys(", ".join(_rest(v, others or [first])) for v in variants))
    lines = dict(zip(dict.fromkeys(recipes), LINES * len(recipes), strict=False))
    figure = new_figure(max(5.0, 1.0 + 3.3 * len(columns)), 6.2)
    axes = figure.subplots(2, len(columns), sharex=True, sharey="row", squeeze=False)
    for variant in variants:
        column = columns.index(variant["levels"][first]) if others else 0
        group = groups.index(", ".join(_rest(variant, others or [first])))
        for recipe, line in lines.items():
            key = (variant["name"], recipe, budget)
            runs = [r["history"] for r in curves if (r["variant"], r["recipe"], r["labels"]) == key]
            for axis, (name, _) in zip(axes[:, column], PANELS, strict=True):
                x, y = mean_curve(runs, name)
                marker = "." if len(x) < 3 else ""  # a line alone does not show a single point
                axis.plot(x, y, line, marker=marker, color=COLORS[group % len(COLORS)], linewidth=1.6)
    for row, (_, title) in zip(axes, PANELS, strict=True):
        for axis, level in zip(row, columns, strict=True):
            dress_epochs(axis, f"{level}: {title}" if others else title, trained)
    for axis in axes[0]:
        axis.set_xlabel("")
    handles: list[Any] = [
        Line2D([], [], color=COLORS[i % len(COLORS)], linewidth=2, label=name)
        for i, name in enumerate(groups)
    ]
    handles += [Line2D([], [], color=INK, linestyle=line, label=name) for name, line in lines.items()]
    legend_below(figure, handles, most=4)
    save(figure, path)


def _rest(variant: CellRow, axes: Sequence[str]) -> list[str]:
    """A variant's levels with their axes where the level alone says too little."""
    return [f"{axis} {variant['levels'][axis]}" for axis in axes]


def _groups(axis: Any, levels: Sequence[str]) -> None:
    """Names of the first axis' levels above their columns, and lines between them."""
    starts = [i for i, level in enumerate(levels) if i == 0 or level != levels[i - 1]]
    for start, end in zip(starts, [*starts[1:], len(levels)], strict=True):
        place = {"xy": ((start + end - 1) / 2, 1.0), "xycoords": ("data", "axes fraction")}
        axis.annotate(
            levels[start], **place, xytext=(0, -12), textcoords="offset points", ha="center", fontsize=10
        )
        if start:
            axis.axvline(start - 0.5, color=INK, linewidth=0.8)


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
