"""Figures of the predicted Dice: how well scores order masks, errors, intervals, and their tables over seeds."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import numpy as np
from scipy import stats

from medseg_supcon.quality import dice_per_class

Row = dict[str, Any]
Masks = list[np.ndarray]


def agreement_of(one: np.ndarray, other: np.ndarray, classes: int) -> float:
    """Mean Dice of two masks; 1 for a class that neither has."""
    return float(np.nan_to_num(dice_per_class(one, other, classes), nan=1.0).mean())


def add_pairwise(runs: list[tuple[list[Row], Masks]]) -> None:
    """A score per row: mean Dice of the run's mask with those of the other runs, of the same form."""
    for index in range(len(runs[0][0])):
        same = {(rows[index]["scan"], rows[index]["kind"]) for rows, _ in runs}
        assert len(same) == 1, same
        masks = [masks[index] for _, masks in runs]
        classes = int(max(mask.max() for _, every in runs[:1] for mask in every)) + 1
        dice = np.full((len(runs), len(runs)), np.nan)
        for a, b in combinations(range(len(runs)), 2):
            dice[a, b] = dice[b, a] = agreement_of(masks[a], masks[b], classes)
        for (rows, _), others in zip(runs, dice, strict=True):
            rows[index]["scores"]["pairwise Dice"] = float(np.nanmean(others))


def excess_aurc(dice: np.ndarray, score: np.ndarray) -> float:
    """Area under the risk-coverage curve above that of the perfect order, as a share of random's (Zenk et al. 2025)."""
    risk, count = 1 - dice, np.arange(1, len(dice) + 1)

    def area(order: np.ndarray) -> float:
        return float((np.cumsum(risk[order]) / count).mean())

    best = area(np.argsort(risk))
    return (area(np.argsort(-score, kind="stable")) - best) / (float(risk.mean()) - best)


def auroc(failed: np.ndarray, score: np.ndarray) -> float:
    """Chance that a failure has a lower score than a success."""
    if failed.all() or not failed.any():
        return float("nan")
    return float(stats.mannwhitneyu(-score[failed], -score[~failed]).statistic / (failed.sum() * (~failed).sum()))


def summary(rows: list[Row]) -> dict[str, float]:
    """The figures of one run, by what they are about."""
    dice, group = np.array([r["dice"] for r in rows]), np.array([r["group"] for r in rows])
    interval, verdict = np.array([r["interval"] for r in rows]), np.array([r["verdict"] for r in rows])
    predicted = np.array([r["scores"]["predicted Dice"] for r in rows])
    clean, dicom, foreign, unknown = (group == g for g in ("clean", "dicom", "foreign", "unknown"))
    own = ~(foreign | dicom)
    within = (dice >= interval[:, 0]) & (dice <= interval[:, 1])
    error = np.abs(predicted - dice)
    result = {
        "Dice, clean": dice[clean].mean(),
        "bias, clean": (predicted - dice)[clean].mean(),
        "error, clean": error[clean].mean(),
        "coverage, clean": within[clean].mean(),
        "clean not good": (verdict[clean] != "good").mean(),
        "Dice, through DICOM": dice[dicom].mean(),
        "error, through DICOM": error[dicom].mean(),
        "not good, through DICOM": (verdict[dicom] != "good").mean(),
        "error, known and unknown": error[own].mean(),
        "error, unknown": error[unknown].mean(),
        "coverage, known and unknown": within[own].mean(),
        "foreign called good": float((verdict[foreign] == "good").sum()),
        "Dice below 0.5": float((own & (dice < 0.5)).sum()),
        "of these called good": float((own & (verdict == "good") & (dice < 0.5)).sum()),
    }
    for score in rows[0]["scores"]:
        values = np.array([r["scores"][score] for r in rows])
        result[f"excess AURC, {score}"] = excess_aurc(dice[own], values[own])
        result[f"excess AURC of unknown, {score}"] = excess_aurc(dice[unknown], values[unknown])
        result[f"AUROC, {score}"] = auroc(dice[own] < 0.5, values[own])
        result[f"Spearman, {score}"] = float(stats.spearmanr(values[own], dice[own]).statistic)
        if score.startswith("predicted Dice with"):
            result[f"error, {score}"] = np.abs(values - dice)[own].mean()
    for score in ("mean probability", "soft Dice", "flip agreement", "kNN distance", "pairwise Dice"):
        if score in rows[0]["scores"]:
            change = result["excess AURC, predicted Dice"] - result[f"excess AURC, {score}"]
            result[f"excess AURC, predicted Dice - {score}"] = change
    for what in ("excess AURC", "excess AURC of unknown", "AUROC", "error"):
        if f"{what}, predicted Dice with projection head" in result:
            one, other = (result[f"{what}, predicted Dice with {s}"] for s in ("projection head", "features"))
            result[f"{what}, projection head - features"] = one - other
    return result


def mean_with_interval(values: np.ndarray) -> str:
    """Of values per seed, with the 95 % interval of Student's t."""
    if len(values) < 2:
        return f"{values.mean():.3f}" if len(values) else ""
    half = stats.t.ppf(0.975, len(values) - 1) * stats.sem(values)
    return f"{values.mean():.3f} +- {half:.3f} ({', '.join(f'{x:.3f}' for x in values)})"


def table(title: str, results: dict[tuple[str, Any], dict[str, float]], recipes: list[str]) -> list[str]:
    """Means over the seeds per recipe, and the paired difference of the first and last recipe."""
    recipes = [recipe for recipe in recipes if any(r == recipe for r, _ in results)]
    pairs = len(recipes) > 1
    heads = [*recipes, *([f"{recipes[0]} - {recipes[-1]}"] if pairs else [])]
    lines = ["", f"## {title}", "", f"| | {' | '.join(heads)} |", "|---|" + "---:|" * len(heads)]
    seeds = sorted({seed for _, seed in results})
    for key in dict.fromkeys(key for result in results.values() for key in result):
        values = {(r, s): result[key] for (r, s), result in results.items() if key in result}
        cells = [mean_with_interval(np.array([values[r, s] for s in seeds if (r, s) in values])) for r in recipes]
        if pairs:
            ends = recipes[0], recipes[-1]
            both = [s for s in seeds if all((r, s) in values for r in ends)]
            cells.append(mean_with_interval(np.array([values[ends[0], s] - values[ends[1], s] for s in both])))
        lines.append(f"| {key} | {' | '.join(cells)} |")
    return lines
