"""Recipes against one another: from rows of results to tables of means and paired differences."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

ScoreArray = npt.NDArray[np.float64]


class PairedDifference(NamedTuple):
    """What `paired_difference` finds.

    Attributes:
        difference: mean over seeds and cases of scores minus baseline.
        low, high: ends of its bootstrap interval.
        p: of Wilcoxon's signed-rank test over cases, two-sided.
        cases, seeds: how many it rests on.
    """

    difference: float
    low: float
    high: float
    p: float
    cases: int
    seeds: int


def bootstrap_means(differences: npt.ArrayLike, resamples: int = 10_000, seed: int = 0) -> ScoreArray:
    """Means of a table of differences whose rows (seeds) and columns (cases) are both drawn with replacement.

    A training seed acts on all cases of its run, so rows and columns are drawn independently of one another
    and a resample is the mean over the drawn rows and the drawn columns (Owen 2007, The pigeonhole bootstrap).

    Args:
        differences: (S, K), a row per seed, a column per case.
        resamples: R, how many means.
        seed: of the draws.

    Returns:
        (R,) means.

    Raises:
        ValueError: not a table, empty, or with a value that is not finite; resamples below 1.

    Example:
        >>> bootstrap_means([[0.5, 0.5]], resamples=2).tolist()
        [0.5, 0.5]
    """
    d = _table("differences", differences)
    if resamples < 1:
        raise ValueError(f"resamples must be at least 1, got {resamples}")
    rng = np.random.default_rng(seed)
    seeds, cases = d.shape
    # How often each row and column is drawn: multinomial counts, so that no index table is made.
    rows = rng.multinomial(seeds, np.full(seeds, 1 / seeds), size=resamples)
    columns = rng.multinomial(cases, np.full(cases, 1 / cases), size=resamples)
    return np.asarray(((rows @ d) * columns).sum(axis=1) / (seeds * cases))


def signed_rank_p(differences: npt.ArrayLike) -> float:
    """Two-sided p of Wilcoxon's signed-rank test; 1 where all differences are zero.

    Zeros are left out (Wilcoxon's own rule); the distribution is exact for few cases (scipy decides).

    Args:
        differences: (K,), one per case.

    Raises:
        ValueError: empty, not a vector, or a value that is not finite.

    Example:
        >>> signed_rank_p([0, 0, 0]), signed_rank_p([1, 2, 3, 4, 5])
        (1.0, 0.0625)
    """
    d = np.asarray(differences, dtype=np.float64)
    if d.ndim != 1 or d.size == 0 or not np.isfinite(d).all():
        raise ValueError(f"differences must be a vector of finite numbers, got shape {d.shape}")
    if not d.any():
        return 1.0
    from scipy.stats import wilcoxon  # takes a second to import

    return float(wilcoxon(d, zero_method="wilcox", alternative="two-sided").pvalue)


def paired_difference(
    scores: npt.ArrayLike,
    baseline: npt.ArrayLike,
    *,
    resamples: int = 10_000,
    seed: int = 0,
    confidence: float = 0.95,
) -> PairedDifference:
    """Scores minus baseline, with a bootstrap interval over seeds and cases and Wilcoxon's test over cases.

    Both come from the same seeds and the same cases. The test sees one difference per case, the mean over
    seeds: runs of one case are no independent cases. The interval is the percentile one of
    `bootstrap_means`; with one seed it does not cover the chance of training, and with two or three it is
    somewhat too narrow.

    Args:
        scores: (S, K), a row per seed, a column per case; Dice, for instance.
        baseline: (S, K), the same for what it is compared with.
        resamples: of the bootstrap.
        seed: of the bootstrap.
        confidence: of the interval, in (0, 1).

    Raises:
        ValueError: shapes differ, a table is empty or holds a value that is not finite, or a confidence
            outside (0, 1).

    Example:
        >>> paired_difference([[0.9, 0.8]], [[0.9, 0.8]])
        PairedDifference(difference=0.0, low=0.0, high=0.0, p=1.0, cases=2, seeds=1)
    """
    a, b = _table("scores", scores), _table("baseline", baseline)
    if a.shape != b.shape:
        raise ValueError(f"scores and baseline must share one shape, got {a.shape} and {b.shape}")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie between 0 and 1, got {confidence}")
    d = a - b
    tail = (1 - confidence) / 2
    low, high = np.quantile(bootstrap_means(d, resamples, seed), (tail, 1 - tail))
    per_case = d.mean(axis=0)
    return PairedDifference(
        float(d.mean()), float(low), float(high), signed_rank_p(per_case), d.shape[1], d.shape[0]
    )


def _table(name: str, values: Any) -> ScoreArray:
    table = np.asarray(values, dtype=np.float64)
    if table.ndim != 2 or table.size == 0:
        raise ValueError(f"{name} must be (seeds, cases) and not empty, got shape {table.shape}")
    if not np.isfinite(table).all():
        raise ValueError(f"{name} must be finite numbers, found NaN or infinity")
    return table


Row = dict[str, Any]
Array = npt.NDArray[np.float64]

FEWEST_CASES = 6  # with fewer, even differences of one sign throughout give no p below 0.05
MEAN = "mean"  # the name under which the mean over classes stands in tables
LEFT_OUT_RULE = (
    "A class that a test case does not have gets no score from a run that rightly left it empty. It is left "
    "out for that case in all runs, so that every run's mean is over the same cases."
)


def compare_recipes(
    rows: Iterable[Row], recipes: Sequence[str], *, resamples: int = 10_000, seed: int = 0
) -> list[Row]:
    """Every recipe against the first, for each label budget, class and the mean over classes.

    Args:
        rows: one per run, case and class, with ``recipe``, ``labels``, ``seed``, ``case``, ``class``, ``dice``
            (0..1 or None where there is no score). Other keys are not read.
        recipes: names, the baseline first; a name that stands twice is compared with itself.
        resamples: of the bootstrap.
        seed: of the bootstrap.

    Returns:
        Rows ``recipe``, ``baseline``, ``labels``, ``class`` (``mean``: over classes, per case), ``dice``,
        ``baseline_dice``, ``difference``, ``low``, ``high`` (95 %), ``p``, ``cases``, ``seeds``, ``left_out``
        (cases without a score).

    Raises:
        ValueError: fewer than two recipes, or a recipe has no rows for a budget or lacks one of its runs' cases.

    Example:
        >>> rows = [{"recipe": r, "labels": 5, "seed": 0, "case": "a", "class": "organ", "dice": d}
        ...         for r, d in (("x", 0.5), ("y", 0.75))]
        >>> compare_recipes(rows, ["x", "y"])[0]["difference"]
        0.25
    """
    if len(recipes) < 2:
        raise ValueError(f"recipes must name at least two, the baseline first; got {list(recipes)}")
    rows = list(rows)
    found = []
    for labels in sorted({row["labels"] for row in rows}):
        scores = score_tables([row for row in rows if row["labels"] == labels], recipes)
        for recipe in recipes[1:]:
            for name, tables in scores.items():
                found.append(
                    {"recipe": recipe, "baseline": recipes[0], "labels": labels, "class": name}
                    | _difference(tables[recipe], tables[recipes[0]], resamples, seed)
                )
    return found


def _difference(scores: Array, baseline: Array, resamples: int, seed: int) -> Row:
    scored = np.isfinite(baseline[0])
    left_out = int((~scored).sum())
    if not scored.any():
        nothing = dict.fromkeys(("dice", "baseline_dice", "difference", "low", "high", "p"))
        return {**nothing, "cases": 0, "seeds": len(scores), "left_out": left_out}
    a, b = scores[:, scored], baseline[:, scored]
    d = paired_difference(a, b, resamples=resamples, seed=seed)
    return {
        "dice": float(a.mean()),
        "baseline_dice": float(b.mean()),
        **d._asdict(),
        "left_out": left_out,
    }


def score_tables(rows: Sequence[Row], recipes: Iterable[str]) -> dict[str, dict[str, Array]]:
    """The Dice of one label budget as tables, class -> recipe -> (S, K), and the mean over classes as ``mean``.

    Seeds and cases are in sorted order. A class that some run has no score for is NaN for that case in all.

    Raises:
        ValueError: a run lacks a case, or the rows name no run of a recipe.
    """
    names = list(dict.fromkeys(recipes))
    seeds = sorted({row["seed"] for row in rows})
    cases = sorted({row["case"] for row in rows})
    classes = list(dict.fromkeys(row["class"] for row in rows))
    found = {(r["recipe"], r["seed"], r["case"], r["class"]): r["dice"] for r in rows}
    table = np.full((len(names), len(seeds), len(cases), len(classes)), np.nan)
    for index in np.ndindex(*table.shape):
        recipe, seed, case, name = (
            of[i] for of, i in zip((names, seeds, cases, classes), index, strict=True)
        )
        if (recipe, seed, case, name) not in found:
            raise ValueError(f"there is no result of {recipe!r}, seed {seed}, for {name!r} of case {case!r}")
        value = found[recipe, seed, case, name]
        table[index] = np.nan if value is None else value
    table[:, :, ~np.isfinite(table).all(axis=(0, 1))] = np.nan
    counted = np.isfinite(table).sum(axis=3)
    mean = np.where(counted > 0, np.nansum(table, axis=3) / np.maximum(counted, 1), np.nan)
    scores = {MEAN: {recipe: mean[i] for i, recipe in enumerate(names)}}
    for c, name in enumerate(classes):
        scores[name] = {recipe: table[i, :, :, c] for i, recipe in enumerate(names)}
    return scores


def recipe_means(rows: Iterable[Row], recipes: Sequence[str]) -> list[Row]:
    """Dice of each recipe, label budget and class: the mean over cases and seeds, and how far the seeds differ.

    Returns:
        Rows ``recipe``, ``labels``, ``class`` (``mean`` first), ``dice``, ``seed_std`` (sample standard
        deviation of the runs' means; None with one seed), ``by_seed``, ``cases``, ``seeds``.
    """
    rows = list(rows)
    found = []
    for labels in sorted({row["labels"] for row in rows}):
        scores = score_tables([row for row in rows if row["labels"] == labels], recipes)
        for recipe in dict.fromkeys(recipes):
            for name, tables in scores.items():
                scored = tables[recipe][:, np.isfinite(tables[recipe][0])]
                runs = scored.mean(axis=1) if scored.size else np.zeros(0)
                found.append(
                    {
                        "recipe": recipe,
                        "labels": labels,
                        "class": name,
                        "dice": float(runs.mean()) if runs.size else None,
                        "seed_std": float(runs.std(ddof=1)) if runs.size > 1 else None,
                        "by_seed": runs.tolist(),
                        "cases": scored.shape[1],
                        "seeds": len(scored),
                    }
                )
    return found


def verdict(row: Row) -> str:
    """A difference as a sentence's end: who won and how sure.

    >>> verdict({"difference": 0.02, "low": 0.01, "high": 0.03, "p": 0.001, "recipe": "b", "baseline": "a"})
    'b is clearly better than a'
    """
    if row["difference"] is None:
        return f"{row['recipe']} and {row['baseline']} have no score to compare"
    if row["low"] == row["high"] == 0:
        return f"{row['recipe']} and {row['baseline']} give the same"
    if row["low"] > 0 or row["high"] < 0:
        which = "better" if row["low"] > 0 else "worse"
        few = too_few(row)
        if few:
            return f"{row['recipe']} is {which} than {row['baseline']} {few}; others may say otherwise"
        return f"{row['recipe']} is clearly {which} than {row['baseline']}"
    return f"no clear difference between {row['recipe']} and {row['baseline']}"


def too_few(row: Row) -> str:
    """Of what there is too little for a difference to be clear: one seed, or fewer scans than a test needs; else empty.

    >>> too_few({"seeds": 1, "cases": 4}), too_few({"seeds": 2, "cases": 6})
    ('with this one seed and on these 4 scans', '')
    """
    few = ["with this one seed"] if row.get("seeds") == 1 else []  # the interval knows nothing of other seeds
    cases = row.get("cases", FEWEST_CASES)
    if cases < FEWEST_CASES:
        few.append(f"on {'this one scan' if cases == 1 else f'these {cases} scans'}")
    return " and ".join(few)
