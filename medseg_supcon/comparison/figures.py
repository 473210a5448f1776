"""Pictures of a comparison: Dice against labels, differences with intervals, degraded scans, curves, grids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from medseg_supcon.comparison.statistics import MEAN, excludes_zero
from medseg_supcon.evaluation import INK, color_of, dress, legend_below, new_figure, save

Row = Mapping[str, Any]
Looks = Sequence[tuple[Row, Row]]  # keys of runs -> how their curve looks

BASELINE_COLOR = "#555555"
MARKERS = "osD^vP*X"
LINES = ("-", "--", ":", "-.")
# Darker than the palette of classes where that is pale: lines are thin.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
CONTRAST, DICE = ("contrastive", "Contrastive loss"), ("val_mean_dice", "Validation Dice")
DICE_MARKS: dict[str, Row] = {
    "test": {"markersize": 8},
    "validation": {"markersize": 5, "markerfacecolor": "white"},
    "training": {"markersize": 11, "marker": "_"},
}


def _styles(recipes: Sequence[str]) -> dict[str, tuple[Any, str, float]]:
    """Colour and marker of each recipe, and its offset from a position (-0.5 to 0.5); grey for the baseline."""
    names = list(dict.fromkeys(recipes))
    colors = [BASELINE_COLOR, *COLORS, *(color_of(i) for i in range(len(COLORS) + 1, len(names)))]
    shifts = (np.arange(len(names)) - (len(names) - 1) / 2) / len(names)
    return {n: (colors[i], MARKERS[i % len(MARKERS)], float(shifts[i])) for i, n in enumerate(names)}


def _axis(width: float, height: float, title: str, below: str = "", names: Sequence[str] = ()) -> tuple[Any, Any]:
    """A figure with one plot, whose x axis has these names at 0, 1, ..."""
    figure = new_figure(width, height)
    axis = figure.subplots()
    dress(axis, title, below)
    if names:
        axis.set_xticks(range(len(names)), names, fontsize=8 if any("\n" in name for name in names) else 9)
        axis.set_xlim(-0.6, len(names) - 0.4)
        axis.grid(visible=bool(below), axis="x")
    return figure, axis


def _finish(figure: Any, path: Path, most: int = 5) -> None:
    legend_below(figure, figure.axes[0].get_legend_handles_labels()[0], most)
    save(figure, path)


def _of_largest_budget(rows: Sequence[Row]) -> tuple[int, list[Row]]:
    budget = max(row["labels"] for row in rows)
    return budget, [row for row in rows if row["labels"] == budget]


def efficiency_figure(means: Sequence[Row], recipes: Sequence[str], path: Path) -> None:
    """Mean Dice over classes against the number of labelled scans; each run is a small dot."""
    budgets = sorted({row["labels"] for row in means})
    # The budgets are evenly spaced: 5, 10 and 200 labels can all be seen.
    below = "labelled scans (validation included)"
    figure, axis = _axis(6.6, 4.0, "Mean Dice on the test scans", below, [str(n) for n in budgets])
    width = 0.27 if len(budgets) > 1 else 0.9
    for recipe, (color, marker, shift) in _styles(recipes).items():
        rows = [r for r in means if r["recipe"] == recipe and r["class"] == MEAN and r["by_seed"]]
        x = [budgets.index(row["labels"]) + width * shift for row in rows]
        for place, row in zip(x, rows, strict=True):
            axis.plot([place] * len(row["by_seed"]), row["by_seed"], ".", color=color, alpha=0.45, markersize=7)
        axis.plot(x, [row["dice"] for row in rows], label=recipe, marker=marker, markersize=7, color=color)
    _finish(figure, path)


def differences_figure(differences: Sequence[Row], path: Path) -> None:
    """Each paired difference with its 95 % interval, in Dice points; filled if the interval excludes 0."""
    rows = sorted((row for row in differences if row["difference"] is not None), key=lambda row: row["labels"])
    baseline = rows[0]["baseline"] if rows else "the baseline"
    styles = _styles([baseline, *(row["recipe"] for row in rows)])
    below = "Dice points (right of 0: better than the baseline), 95 % interval"
    figure, axis = _axis(7.2, 0.9 + 0.34 * max(len(rows), 2), f"Difference from {baseline}", below)
    axis.axvline(0, color=INK, linewidth=1.0)
    names = []
    for place, row in enumerate(rows):
        color, mean = styles[row["recipe"]][0], row["class"] == MEAN
        low, middle, high = (100 * row[key] for key in ("low", "difference", "high"))
        axis.plot([low, high], [-place] * 2, color=color, linewidth=2.6 if mean else 1.4, solid_capstyle="butt")
        filled = color if excludes_zero(row) else "white"
        axis.plot(middle, -place, marker="o", markersize=7, color=color, markerfacecolor=filled)
        names.append(f"{row['labels']} labels, {row['recipe']}" + ("" if mean else f": {row['class']}"))
    axis.set_yticks([-i for i in range(len(rows))], names)
    axis.set_ylim(-len(rows) + 0.4, 0.6)
    axis.margins(x=0.12)
    save(figure, path)


def robustness_figure(robustness: Sequence[Row], recipes: Sequence[str], path: Path) -> None:
    """Mean Dice of the same models on the test scans as they are and degraded, at the largest budget."""
    budget, rows = _of_largest_budget(robustness)
    conditions = list(dict.fromkeys(row["condition"] for row in rows))
    dice = {(row["condition"], row["recipe"]): row["dice"] for row in rows}
    dice |= {(row["condition"], row["baseline"]): row["baseline_dice"] for row in rows}
    figure, axis = _axis(7.2, 3.6, f"Mean Dice on degraded test scans ({budget} labels)", names=conditions)
    for recipe, (color, _, shift) in _styles(recipes).items():
        heights = np.array([dice[condition, recipe] for condition in conditions], dtype=float)  # None becomes NaN
        axis.bar(np.arange(len(conditions)) + 0.8 * shift, heights, 0.74 / len(set(recipes)), color=color, label=recipe)
    axis.set_ylim(0, 1)
    _finish(figure, path)


def grid_figure(table: Sequence[Row], recipes: Sequence[str], path: Path) -> None:
    """Dice of every variant at the largest budget: test large, validation hollow, training a dash."""
    budget, rows = _of_largest_budget(table)
    title = f"Dice by {', '.join(rows[0]['levels'])} ({budget} labelled scans)"
    names = ["\n".join(row["levels"].values()) for row in rows]
    figure, axis = _axis(max(6.0, 1.6 + 0.72 * len(rows)), 4.4, title, names=names)
    styles = _styles(recipes)
    for recipe, (color, marker, shift) in styles.items():
        look: Row = {"color": color, "marker": marker, "linestyle": ""}
        for score, style in DICE_MARKS.items():
            dice = np.array([row["of"][recipe][f"{score}_dice"] for row in rows], dtype=float)  # None becomes NaN
            label = recipe if score == "test" else None
            axis.plot(np.arange(len(rows)) + 0.22 * len(styles) * shift, dice, label=label, **{**look, **style})
    for score, style in DICE_MARKS.items():
        axis.plot([], [], label=score, **{"color": INK, "marker": "o", "linestyle": "", **style})
    axis.set_ylim(bottom=0)
    _finish(figure, path, most=6)


def learning_figure(histories: Sequence[Row], recipes: Sequence[str], path: Path) -> None:
    """Loss, contrastive loss and validation Dice by epoch at the largest budget; thin: each run, bold: their mean."""
    _, runs = _of_largest_budget(histories)
    figure, styles = new_figure(10.5, 3.4), _styles(recipes)
    looks = [({"recipe": name}, {"color": styles[name][0], "linewidth": 2.0, "label": name}) for name in styles]
    for axis, (column, title) in zip(figure.subplots(1, 3), (("loss", "Training loss"), CONTRAST, DICE), strict=True):
        _draw_curves(axis, title, column, runs, looks, each=True)
    _finish(figure, path)


def grid_curves_figure(histories: Sequence[Row], variants: Sequence[Row], recipes: Sequence[str], path: Path) -> None:
    """Contrastive loss and validation Dice by epoch: a column per level of the first axis, a colour per variant."""
    _, runs = _of_largest_budget(histories)
    first, *others = variants[0]["levels"]
    columns = list(dict.fromkeys(v["levels"][first] for v in variants)) if others else [first]
    group_of = {v["name"]: ", ".join(f"{a} {v['levels'][a]}" for a in others or [first]) for v in variants}
    colors = {group: COLORS[i % len(COLORS)] for i, group in enumerate(dict.fromkeys(group_of.values()))}
    lines = dict(zip(dict.fromkeys(recipes), LINES * len(recipes), strict=False))
    figure = new_figure(max(5.0, 1.0 + 3.3 * len(columns)), 6.2)
    axes = figure.subplots(2, len(columns), sharex=True, sharey="row", squeeze=False)
    for (level_number, level), (row, (column, title)) in product(enumerate(columns), enumerate((CONTRAST, DICE))):
        shown = [v["name"] for v in variants if not others or v["levels"][first] == level]
        looks = [
            ({"variant": name, "recipe": recipe}, {"color": colors[group_of[name]], "linestyle": line})
            for name, (recipe, line) in product(shown, lines.items())
        ]
        heading = f"{level}: {title.lower()}" if others else title
        _draw_curves(axes[row, level_number], heading, column, runs, looks)
        axes[row, level_number].label_outer()
    for group, color in colors.items():
        axes[0, 0].plot([], [], color=color, linewidth=2, label=group)
    for recipe, line in lines.items():
        axes[0, 0].plot([], [], color=INK, linestyle=line, label=recipe)
    _finish(figure, path, most=4)


def _draw_curves(axis: Any, title: str, column: str, runs: Sequence[Row], looks: Looks, each: bool = False) -> None:
    """By epoch, the mean of the runs that have a look's keys, over the epochs that all have; with ``each``, also each run."""
    for keys, look in looks:
        histories = [run["history"] for run in runs if keys.items() <= run.items()]
        curves = [{int(row["epoch"]): row[column] for row in rows if column in row} for rows in histories]
        curves = [curve for curve in curves if any(curve.values())]  # 0 throughout: a term that is not in use
        for curve in curves if each else ():
            axis.plot(list(curve), list(curve.values()), color=look["color"], linewidth=0.7, alpha=0.5)
        epochs = sorted(set.intersection(*map(set, curves))) if curves else []
        mean = [float(np.mean([curve[epoch] for curve in curves])) for epoch in epochs]
        axis.plot(epochs, mean, marker="." if len(epochs) < 3 else "", **look)  # a line alone would not show a point
    dress(axis, title, epochs=[int(row["epoch"]) for run in runs for row in run["history"]])
