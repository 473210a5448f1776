"""Statistics of a comparison: from rows of results to means, paired differences, a grid's table and a verdict."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import product
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from medseg_supcon.text import counted

Array = npt.NDArray[np.float64]
Row = dict[str, Any]

MEAN = "mean"  # the class name of the mean over classes in tables
RUN_SCORES = ("contrastive_loss", "training_dice", "validation_dice", "test_dice")
COMPARED = ("difference", "low", "high", "p")
FEWEST_SEEDS = 3  # fewer say little about the chance of training
FEWEST_CASES = 6  # with fewer, p cannot fall below 0.05
ALPHA = 0.05
TAIL = (1 - 0.95) / 2  # of an interval


class PairedDifference(NamedTuple):
    """Mean of scores minus baseline, its bootstrap interval, Wilcoxon's two-sided p over cases, and how many of each."""

    difference: float
    low: float
    high: float
    p: float
    cases: int
    seeds: int


def bootstrap_means(differences: npt.ArrayLike, resamples: int = 10_000, seed: int = 0) -> Array:
    """(resamples,) means of resampled (S, K) differences; seeds (rows) and cases (columns) are drawn with replacement.

    They are drawn independently: a seed affects all cases of its run (Owen 2007, The pigeonhole bootstrap).
    """
    d, rng = np.asarray(differences, dtype=np.float64), np.random.default_rng(seed)
    # How often each row and column is drawn: multinomial counts, so that no index table is made.
    rows, columns = (rng.multinomial(n, np.full(n, 1 / n), size=resamples) for n in d.shape)
    return np.asarray(((rows @ d) * columns).sum(axis=1) / d.size)


def signed_rank_p(differences: npt.ArrayLike) -> float:
    """Two-sided p of Wilcoxon's signed-rank test over (K,) differences, zeros left out; 1 if all of them are zero."""
    from scipy.stats import wilcoxon  # takes a second to import

    return float(wilcoxon(differences).pvalue) if np.any(differences) else 1.0


def paired_difference(
    scores: npt.ArrayLike, baseline: npt.ArrayLike, *, resamples: int = 10_000, seed: int = 0
) -> PairedDifference:
    """Scores minus baseline, with a 95 % bootstrap interval over seeds and cases and Wilcoxon's test over cases.

    The test takes one difference per case, the mean over seeds, because runs on one case are not independent cases.
    The interval is a percentile interval. With one training seed it does not cover the chance of training, and with two or
    three it is somewhat too narrow. ``seed`` is that of the bootstrap's draws.

    Args:
        scores, baseline: (S, K), a row per training seed, a column per case, the same on both sides.

    Raises:
        ValueError: shapes differ, a table is empty or has a value that is not finite, or resamples is below 1.

    Example:
        >>> paired_difference([[0.9, 0.8]], [[0.9, 0.8]])
        PairedDifference(difference=0.0, low=0.0, high=0.0, p=1.0, cases=2, seeds=1)
    """
    a, b = (np.asarray(table, dtype=np.float64) for table in (scores, baseline))
    if a.shape != b.shape or a.ndim != 2 or a.size == 0 or not np.isfinite([a, b]).all():
        raise ValueError(f"scores and baseline must be finite (seeds, cases) of one shape, got {a.shape}, {b.shape}")
    if resamples < 1:
        raise ValueError(f"resamples must be at least 1, got {resamples}")
    d = a - b
    low, high = np.quantile(bootstrap_means(d, resamples, seed), (TAIL, 1 - TAIL))
    return PairedDifference(float(d.mean()), float(low), float(high), signed_rank_p(d.mean(axis=0)), *d.shape[::-1])


def compare_recipes(rows: Iterable[Row], recipes: Sequence[str]) -> list[Row]:
    """Every recipe against the first (which may be compared with itself), for each label budget, class and their mean.

    Takes a row per run, case and class. ``p`` is None with few seeds or cases, or if the interval contradicts it.
    """
    if len(recipes) < 2:
        raise ValueError(f"recipes must name at least two, the baseline first; got {list(recipes)}")
    differences = []
    for labels, scores in _by_budget(rows, recipes):
        for recipe, (name, tables) in product(recipes[1:], scores.items()):
            row: Row = {"recipe": recipe, "baseline": recipes[0], "labels": labels, "class": name}
            scored = np.isfinite(tables[recipe][0])
            a, b = (tables[one][:, scored] for one in (recipe, recipes[0]))
            row |= dict.fromkeys(("dice", "baseline_dice", *PairedDifference._fields)) | {"cases": 0, "seeds": len(a)}
            if scored.any():
                row |= {"dice": float(a.mean()), "baseline_dice": float(b.mean())} | paired_difference(a, b)._asdict()
                if too_few(row) or (row["p"] < ALPHA and not excludes_zero(row)):
                    row["p"] = None
            differences.append(row | {"left_out": int((~scored).sum())})
    return differences


def _by_budget(rows: Iterable[Row], recipes: Iterable[str]) -> Iterator[tuple[int, dict[str, dict[str, Array]]]]:
    """Each budget and its Dice: class (``mean`` first) -> recipe -> (S, K); NaN in all runs if one has no score."""
    rows, names = list(rows), list(dict.fromkeys(recipes))
    for labels in sorted({row["labels"] for row in rows}):
        mine = [row for row in rows if row["labels"] == labels]
        seeds, cases = (sorted({row[key] for row in mine}) for key in ("seed", "case"))
        classes = list(dict.fromkeys(row["class"] for row in mine))
        dice = {(r["recipe"], r["seed"], r["case"], r["class"]): r["dice"] for r in mine}
        try:
            values = [dice[key] for key in product(names, seeds, cases, classes)]
        except KeyError as error:
            raise ValueError("no result of {!r}, seed {}, case {!r}, class {!r}".format(*error.args[0])) from None
        # None becomes NaN
        table = np.array(values, dtype=np.float64).reshape(len(names), len(seeds), len(cases), len(classes))
        table[:, :, ~np.isfinite(table).all(axis=(0, 1))] = np.nan
        mean = np.ma.masked_invalid(table).mean(axis=3).filled(np.nan)
        by_class = {MEAN: mean} | {name: table[..., c] for c, name in enumerate(classes)}
        yield labels, {name: dict(zip(names, of, strict=True)) for name, of in by_class.items()}


def recipe_means(rows: Iterable[Row], recipes: Sequence[str]) -> list[Row]:
    """Dice of each recipe, budget and class (``mean`` first): mean over cases and seeds, and the runs' ``seed_std``."""
    means = []
    for labels, scores in _by_budget(rows, recipes):
        for recipe, (name, tables) in product(dict.fromkeys(recipes), scores.items()):
            scored = tables[recipe][:, np.isfinite(tables[recipe][0])]
            runs = scored.mean(axis=1) if scored.size else np.zeros(0)
            row = {"recipe": recipe, "labels": labels, "class": name}
            row["dice"] = float(runs.mean()) if runs.size else None
            row["seed_std"] = float(runs.std(ddof=1)) if runs.size > 1 else None
            means.append(row | {"by_seed": runs.tolist(), "cases": scored.shape[1], "seeds": len(scored)})
    return means


def grid_table(
    variants: Sequence[Row], runs: Sequence[Row], results: Iterable[Row], headline: Iterable[Row]
) -> list[Row]:
    """A row per budget and variant; ``of`` maps a recipe to its means of `RUN_SCORES` over seeds, and its difference."""
    # the test Dice is over the same classes and cases for all variants and recipes
    rows = [row | {"recipe": (row["variant"], row["recipe"])} for row in results]
    means = recipe_means(rows, [row["recipe"] for row in rows])
    tested = {(*row["recipe"], row["labels"]): row["dice"] for row in means if row["class"] == MEAN}
    paired = {(row["variant"], row["recipe"], row["labels"]): row for row in headline}
    recipes = dict.fromkeys(run["recipe"] for run in runs)
    table = []
    for labels, variant in product(sorted({run["labels"] for run in runs}), variants):
        of: dict[str, Row] = {}
        for recipe in recipes:
            key = variant["name"], recipe, labels
            mine = [run for run in runs if (run["variant"], run["recipe"], run["labels"]) == key]
            known = {score: [run[score] for run in mine if run.get(score) is not None] for score in RUN_SCORES}
            of[recipe] = {score: fmean(values) if values else None for score, values in known.items()}
            of[recipe] |= {"test_dice": tested[key]} | {name: paired.get(key, {}).get(name) for name in COMPARED}
        table.append({"labels": labels, "variant": variant["name"], "levels": variant["levels"], "of": of})
    return table


def excludes_zero(row: Mapping[str, Any]) -> int:
    """1: the interval of a difference is above 0; -1: below; 0: neither, or there is no difference."""
    return 0 if row["difference"] is None else int(row["low"] > 0) - int(row["high"] < 0)


def too_few(row: Row) -> str:
    """What there is too little of for a clear difference, in words (``with 1 seed and 4 test scans``); or nothing."""
    few = [counted(row["seeds"], "seed")] if row["seeds"] < FEWEST_SEEDS else []
    few += [counted(row["cases"], "test scan")] if row["cases"] < FEWEST_CASES else []
    return f"with {' and '.join(few)}" if few else ""


def verdict(row: Row) -> str:
    """A difference in words: which recipe is better, and how sure that is. The interval decides."""
    recipe, baseline = row["recipe"], row["baseline"]
    if row["difference"] is None:
        return f"{recipe} and {baseline} have no score to compare"
    if row["low"] == row["high"] == 0:
        return f"{recipe} and {baseline} give the same result"
    if not excludes_zero(row):
        return f"no clear difference between {recipe} and {baseline}"
    which = "better" if excludes_zero(row) > 0 else "worse"
    if too_few(row):
        return f"{recipe} is {which} than {baseline} {too_few(row)}: too few to be sure"
    if row["p"] is not None and row["p"] >= ALPHA:
        return f"{recipe} is {which} than {baseline}, but not clearly"
    return f"{recipe} is clearly {which} than {baseline}"
