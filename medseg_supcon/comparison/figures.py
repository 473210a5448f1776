"""Pictures of a comparison: Dice against labels, differences with intervals, robustness, training curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from medseg_supcon.comparison.statistics import MEAN
from medseg_supcon.evaluation import INK, color_of, dress, dress_epochs, legend_below, new_figure, save

Row = Mapping[str, Any]
Histories = Mapping[str, tuple[str, int, Sequence[Mapping[str, str]]]]  # run -> recipe, labels, history.csv

BASELINE_COLOR = "#555555"
MARKERS = "osD^vP*X"
# Darker than the palette of classes where that is pale: lines are thin.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")


def recipe_colors(recipes: Sequence[str]) -> dict[str, Any]:
    """The baseline is grey, the others are told apart by colour-blind people, too."""
    names = list(dict.fromkeys(recipes))
    others = {name: COLORS[i] if i < len(COLORS) else color_of(i + 1) for i, name in enumerate(names[1:])}
    return {names[0]: BASELINE_COLOR, **others}


def efficiency_figure(means: Sequence[Row], recipes: Sequence[str], path: Path) -> None:
    """Mean Dice over classes against the number of labelled scans; each run is a small dot."""
    colors = recipe_colors(recipes)
    budgets = sorted({row["labels"] for row in means})
    figure = new_figure(6.6, 4.0)
    axis = figure.subplots()
    # Places rather than numbers: 5, 10 and 200 labels are all to be seen.
    shift = 0.09 if len(budgets) > 1 else 0.5
    for number, (recipe, color) in enumerate(colors.items()):
        rows = {
            r["labels"]: r for r in means if r["recipe"] == recipe and r["class"] == MEAN and r["by_seed"]
        }
        x = [budgets.index(n) + shift * (number - (len(colors) - 1) / 2) for n in rows]
        y = [row["dice"] for row in rows.values()]
        for place, row in zip(x, rows.values(), strict=True):
            axis.plot(
                [place] * len(row["by_seed"]), row["by_seed"], ".", color=color, alpha=0.45, markersize=7
            )
        style = {"marker": MARKERS[number % len(MARKERS)], "markersize": 7, "color": color}
        axis.plot(x, y, linewidth=1.6, label=recipe, **style)
    axis.set_xticks(range(len(budgets)), [str(n) for n in budgets])
    axis.set_xlim(-0.6, len(budgets) - 0.4)
    dress(axis, "Mean Dice on the test scans", "labelled scans (validation included)")
    axis.legend(fontsize=9, frameon=False, loc="best")
    save(figure, path)


def differences_figure(differences: Sequence[Row], path: Path) -> None:
    """Each paired difference with its 95 % interval, in Dice points; filled where the interval excludes 0."""
    rows = [row for row in differences if row["difference"] is not None]
    rows.sort(key=lambda row: row["labels"])
    colors = recipe_colors([rows[0]["baseline"], *(row["recipe"] for row in rows)] if rows else ["", ""])
    figure = new_figure(7.2, 0.9 + 0.34 * max(len(rows), 2))
    axis = figure.subplots()
    axis.axvline(0, color=INK, linewidth=1.0)
    for place, row in enumerate(rows):
        color, y = colors[row["recipe"]], -place
        low, middle, high = (100 * row[key] for key in ("low", "difference", "high"))
        wide = 2.6 if row["class"] == MEAN else 1.4
        axis.plot([low, high], [y, y], color=color, linewidth=wide, solid_capstyle="butt")
        clear = row["low"] > 0 or row["high"] < 0
        axis.plot(
            middle, y, marker="o", markersize=7, color=color, markerfacecolor=color if clear else "white"
        )
    one_class = len({row["class"] for row in rows}) == 1
    names = [
        f"{row['labels']} labels, {row['recipe']}" + ("" if one_class else f": {_class_name(row['class'])}")
        for row in rows
    ]
    axis.set_yticks([-i for i in range(len(rows))], names)
    axis.set_ylim(-len(rows) + 0.4, 0.6)
    ends = [0.0, *(100 * row[key] for row in rows for key in ("low", "high"))]
    margin = 0.12 * (max(ends) - min(ends)) or 1.0
    axis.set_xlim(min(ends) - margin, max(ends) + margin)
    baseline = rows[0]["baseline"] if rows else "the baseline"
    dress(
        axis,
        f"Difference from {baseline}",
        "Dice points (right of 0: better than the baseline), 95 % interval",
    )
    save(figure, path)


def robustness_figure(robustness: Sequence[Row], recipes: Sequence[str], path: Path) -> None:
    """Mean Dice of the same models on the test scans as they are and made worse, at the largest budget."""
    budget = max(row["labels"] for row in robustness)
    rows = [row for row in robustness if row["labels"] == budget]
    conditions = list(dict.fromkeys(row["condition"] for row in rows))
    colors = recipe_colors(recipes)
    figure = new_figure(7.2, 3.6)
    axis = figure.subplots()
    width = 0.8 / len(colors)
    for number, (recipe, color) in enumerate(colors.items()):
        heights = []
        for condition in conditions:
            mine = [row for row in rows if row["condition"] == condition]
            own = next((row["dice"] for row in mine if row["recipe"] == recipe), None)
            heights.append(mine[0]["baseline_dice"] if number == 0 else own)
        x = np.arange(len(conditions)) + width * (number - (len(colors) - 1) / 2)
        values = [np.nan if h is None else h for h in heights]
        axis.bar(x, values, 0.92 * width, color=color, label=recipe)
    axis.set_xticks(range(len(conditions)), conditions)
    axis.set_ylim(0, 1)
    dress(axis, f"Mean Dice on test scans made worse ({budget} labels)", "")
    axis.grid(visible=False, axis="x")
    legend_below(figure, axis.get_legend_handles_labels()[0], most=5)
    save(figure, path)


def learning_figure(histories: Histories, recipes: Sequence[str], path: Path) -> None:
    """Loss, contrastive loss and validation Dice by epoch at the largest budget; thin: each run, bold: their mean."""
    budget = max(labels for _, labels, _ in histories.values())
    colors = recipe_colors(recipes)
    trained = [
        int(row["epoch"]) for _, labels, rows in histories.values() if labels == budget for row in rows
    ]
    panels = [
        ("loss", "Training loss"),
        ("contrastive", "Contrastive loss"),
        ("val_mean_dice", "Validation Dice"),
    ]
    figure = new_figure(10.5, 3.4)
    for axis, (column, title) in zip(figure.subplots(1, 3), panels, strict=True):
        for recipe, color in colors.items():
            mine = [rows for name, n, rows in histories.values() if name == recipe and n == budget]
            for run in used_curves(mine, column):
                axis.plot(list(run), list(run.values()), color=color, linewidth=0.7, alpha=0.5)
            epochs, mean = mean_curve(mine, column)
            axis.plot(
                epochs, mean, color=color, linewidth=2.0, marker="." if len(epochs) < 3 else "", label=recipe
            )
        dress_epochs(axis, title, trained)
    legend_below(figure, figure.axes[0].get_legend_handles_labels()[0], most=5)
    save(figure, path)


def used_curves(histories: Sequence[Sequence[Mapping[str, str]]], column: str) -> list[dict[int, float]]:
    """Epoch -> value of each history; without those that are 0 throughout: a term that is not in use."""
    curves = [
        {int(row["epoch"]): float(row[column]) for row in rows if row.get(column)} for rows in histories
    ]
    return [curve for curve in curves if any(curve.values())]


def mean_curve(
    histories: Sequence[Sequence[Mapping[str, str]]], column: str
) -> tuple[list[int], list[float]]:
    """The epochs that all `used_curves` have, and the mean there."""
    curves = used_curves(histories, column)
    epochs = sorted(set.intersection(*(set(curve) for curve in curves))) if curves else []
    return epochs, [float(np.mean([curve[epoch] for curve in curves])) for epoch in epochs]


def _class_name(name: str) -> str:
    return "mean over classes" if name == MEAN else name
