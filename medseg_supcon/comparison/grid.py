"""A grid of variants: every recipe under every combination of settings, as one table and its reading."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from medseg_supcon.comparison.render import counted, points
from medseg_supcon.comparison.statistics import FEWEST_CASES, MEAN, compare_recipes, recipe_means, verdict

Row = dict[str, Any]
SCORES = ("contrastive_loss", "training_dice", "validation_dice", "test_dice")
Means = Mapping[tuple[str, str, int], float | None]  # by variant, recipe and label budget


def means_of_tests(variants: Sequence[Row], recipes: Sequence[str], results: Sequence[Row]) -> Means:
    """Mean test Dice over classes, cases and seeds, over the same classes and cases for every variant and recipe.

    Args:
        variants: ``name`` of each.
        recipes: names.
        results: a row per run, test case and class, with ``variant``, as `compare_recipes` takes them.
    """
    both = {f"{v['name']}\0{recipe}": (v["name"], recipe) for v in variants for recipe in recipes}
    rows = [row | {"recipe": f"{row['variant']}\0{row['recipe']}"} for row in results]
    means = [row for row in recipe_means(rows, list(both)) if row["class"] == MEAN]
    return {(*both[row["recipe"]], row["labels"]): row["dice"] for row in means}


def grid_table(
    variants: Sequence[Row], recipes: Sequence[str], runs: Sequence[Row], tested: Means
) -> list[Row]:
    """A row per label budget and variant: its levels, and each recipe's scores, means over seeds.

    Args:
        variants: ``name`` and ``levels`` (axis -> level) of each.
        recipes: names, the baseline first.
        runs: a row per run: ``variant``, ``recipe``, ``labels`` and the first `SCORES`, which may be missing or None.
        tested: `means_of_tests`.

    Returns:
        Rows ``labels``, ``variant``, ``levels``, and ``of``: recipe -> score -> value or None.
    """
    found = []
    for labels in sorted({run["labels"] for run in runs}):
        for variant in variants:
            of = {}
            for recipe in dict.fromkeys(recipes):
                key = (variant["name"], recipe, labels)
                mine = [run for run in runs if (run["variant"], run["recipe"], run["labels"]) == key]
                of[recipe] = {score: _mean([run.get(score) for run in mine]) for score in SCORES[:-1]}
                of[recipe]["test_dice"] = tested[variant["name"], recipe, labels]
            found.append(
                {"labels": labels, "variant": variant["name"], "levels": variant["levels"], "of": of}
            )
    return found


def grid_differences(variants: Sequence[Row], recipes: Sequence[str], results: Sequence[Row]) -> list[Row]:
    """`compare_recipes` within every variant: rows with ``variant`` first."""
    found = []
    for variant in variants:
        rows = [row for row in results if row["variant"] == variant["name"]]
        found += [{"variant": variant["name"]} | row for row in compare_recipes(rows, recipes)]
    return found


def level_means(table: Sequence[Row], recipes: Sequence[str]) -> list[Row]:
    """What an axis does: each recipe's mean test Dice over all variants of one level, per label budget.

    Returns:
        Rows ``labels``, ``axis``, ``level``, ``variants`` (how many), ``of``: recipe -> mean test Dice.
    """
    found = []
    for labels in sorted({row["labels"] for row in table}):
        mine = [row for row in table if row["labels"] == labels]
        for axis in mine[0]["levels"]:
            for level in dict.fromkeys(row["levels"][axis] for row in mine):
                at = [row for row in mine if row["levels"][axis] == level]
                of = {
                    recipe: _mean([row["of"][recipe]["test_dice"] for row in at])
                    for recipe in dict.fromkeys(recipes)
                }
                found.append({"labels": labels, "axis": axis, "level": level, "variants": len(at), "of": of})
    return found


def best_variants(
    table: Sequence[Row], recipes: Sequence[str], results: Sequence[Row], classes: Sequence[str] = (MEAN,)
) -> list[Row]:
    """Each recipe at its own best variant, chosen by validation Dice, against the baseline at its own.

    Returns:
        Rows as of `compare_recipes` for the classes asked for, with ``variant`` and ``baseline_variant``; none
        where a recipe has no validation Dice.
    """
    found = []
    for labels in sorted({row["labels"] for row in table}):
        chosen = {}
        for recipe in dict.fromkeys(recipes):
            scored = [
                row
                for row in table
                if row["labels"] == labels and row["of"][recipe]["validation_dice"] is not None
            ]
            if not scored:
                return []
            chosen[recipe] = max(scored, key=lambda row: row["of"][recipe]["validation_dice"])["variant"]
        rows = [r for r in results if r["labels"] == labels and r["variant"] == chosen.get(r["recipe"])]
        for row in compare_recipes(rows, recipes):
            if row["class"] in classes:
                names = {
                    "variant": chosen[row["recipe"]],
                    "baseline_variant": chosen[recipes[0]],
                }
                found.append(names | row)
    return found


def grid_answers(differences: Sequence[Row], best: Sequence[Row]) -> list[str]:
    """How often each recipe beats the baseline, and how it fares where both are at their best."""
    found = []
    headline = [row for row in differences if row["class"] == MEAN]
    for labels, recipe in dict.fromkeys((row["labels"], row["recipe"]) for row in headline):
        mine = [row for row in headline if (row["labels"], row["recipe"]) == (labels, recipe)]
        better = sum(row["low"] is not None and row["low"] > 0 for row in mine)
        worse = sum(row["high"] is not None and row["high"] < 0 for row in mine)
        sure = "clearly " if all(row["seeds"] > 1 and row["cases"] >= FEWEST_CASES for row in mine) else ""
        found.append(
            f"With {counted(labels, 'labelled scan')}, under the same settings: {recipe} is {sure}better than "
            f"{mine[0]['baseline']} in {better} of {len(mine)} variants, {sure}worse in {worse}; in "
            f"{len(mine) - better - worse} the interval holds 0."
        )
    for row in best:
        if row["difference"] is None:
            continue
        found.append(
            f"With {counted(row['labels'], 'labelled scan')}, each at its best variant by validation Dice: {verdict(row)}. "
            f"{row['recipe']} ({row['variant']}) scores {row['dice']:.4f} on the test scans, {row['baseline']} "
            f"({row['baseline_variant']}) {row['baseline_dice']:.4f}: {points(row['difference'])} Dice points "
            f"(95 % interval {points(row['low'])} to {points(row['high'])}, p = {row['p']:.3g}, "
            f"{counted(row['cases'], 'test scan')}, {counted(row['seeds'], 'seed')})."
        )
    return found


def flat(table: Sequence[Row], differences: Sequence[Row]) -> list[Row]:
    """The table for a CSV: a row per label budget, variant and recipe."""
    found = []
    for row in table:
        for recipe, of in row["of"].items():
            key: Mapping[str, Any] = {"variant": row["variant"], "recipe": recipe, "labels": row["labels"]}
            mine = [d for d in differences if d["class"] == MEAN and all(d[k] == v for k, v in key.items())]
            paired = mine[0] if mine else dict.fromkeys(("difference", "low", "high", "p"))
            found.append(
                {"labels": row["labels"], **row["levels"], "recipe": recipe, **of}
                | {name: paired[name] for name in ("difference", "low", "high", "p")}
            )
    return found


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
