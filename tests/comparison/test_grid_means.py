"""Means of a grid: every variant and recipe over the same classes of the same scans, under each condition."""

from __future__ import annotations

import pytest

from medseg_supcon.comparison import grid_table

VARIANTS = [{"name": "slow", "levels": {"rate": "slow"}}, {"name": "fast", "levels": {"rate": "fast"}}]
RECIPES = ["plain", "own"]


def rows_of(variant, recipe, lesion_of_b):
    """Scan a has both classes. Scan b has no lesion: a mask without one has no score there, another has 0."""
    dice = {("a", "organ"): 0.8, ("a", "lesion"): 0.4, ("b", "organ"): 0.9, ("b", "lesion"): lesion_of_b}
    key = {"variant": variant, "recipe": recipe, "labels": 5, "seed": 0}
    return [key | {"case": case, "class": name, "dice": value} for (case, name), value in dice.items()]


def test_a_class_that_one_run_has_no_score_for_is_in_no_mean():
    """So (slow, plain), which predicts a false lesion in b, and the others are means over the same three scores."""
    results = rows_of("slow", "plain", 0.0)
    for variant, recipe in (("slow", "own"), ("fast", "plain"), ("fast", "own")):
        results += rows_of(variant, recipe, None)
    scores = {"labels": 5, "validation_dice": None, "training_dice": 0.5, "test_dice": 0.1}
    runs = [{"variant": v, "recipe": r} | scores for v in ("slow", "fast") for r in RECIPES]
    table = grid_table(VARIANTS, runs, results, [])
    assert [row["variant"] for row in table] == ["slow", "fast"]
    means = [row["of"][recipe].pop("test_dice") for row in table for recipe in RECIPES]
    assert means == pytest.approx([((0.8 + 0.4) / 2 + 0.9) / 2] * 4)
    assert table[0]["of"]["own"] == {
        "contrastive_loss": None, "training_dice": 0.5, "validation_dice": None,
        **dict.fromkeys(("difference", "low", "high", "p")),
    }  # fmt: skip
