"""How sure a difference between two recipes is: functions of arrays, one score per seed and case."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]


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


def bootstrap_means(differences: npt.ArrayLike, resamples: int = 10_000, seed: int = 0) -> Array:
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


def _table(name: str, values: Any) -> Array:
    table = np.asarray(values, dtype=np.float64)
    if table.ndim != 2 or table.size == 0:
        raise ValueError(f"{name} must be (seeds, cases) and not empty, got shape {table.shape}")
    if not np.isfinite(table).all():
        raise ValueError(f"{name} must be finite numbers, found NaN or infinity")
    return table
