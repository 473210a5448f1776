"""Statistics of paired comparisons against loops, scipy and closed forms."""

from __future__ import annotations

import itertools
import math
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from medseg_supcon.comparison import compare_recipes, paired_difference, recipe_means, verdict
from medseg_supcon.comparison.statistics import bootstrap_means, signed_rank_p

quick = settings(deadline=None, max_examples=25, derandomize=True)
tables = hnp.arrays(
    np.float64,
    st.tuples(st.integers(1, 4), st.integers(1, 9)),
    elements=st.floats(0, 1).map(lambda v: round(v, 6)),
)


def signed_rank_by_hand(d):
    """Every assignment of signs to the ranks, counted: no scipy, no ties."""
    d = [x for x in d if x != 0]
    ranks = {x: r for r, x in enumerate(sorted(d, key=abs), 1)}
    total = len(d) * (len(d) + 1) / 2
    observed = abs(sum(ranks[x] for x in d if x > 0) - total / 2)
    extreme = 0
    for signs in itertools.product((0, 1), repeat=len(d)):
        w = sum(s * r for s, r in zip(signs, range(1, len(d) + 1), strict=True))
        extreme += abs(w - total / 2) >= observed - 1e-9
    return extreme / 2 ** len(d)


def bootstrap_by_hand(d, resamples, seed):
    """Loops and Python's own random numbers."""
    rng = random.Random(seed)
    seeds, cases = len(d), len(d[0])
    means = []
    for _ in range(resamples):
        rows = [rng.randrange(seeds) for _ in range(seeds)]
        columns = [rng.randrange(cases) for _ in range(cases)]
        means.append(math.fsum(d[r][c] for r in rows for c in columns) / (seeds * cases))
    return sorted(means)


@pytest.mark.parametrize("n", [1, 2, 5, 8])
def test_signed_rank_counts_every_assignment_of_signs(n):
    rng = np.random.default_rng(n)
    for shift in (0.0, 0.5):
        d = rng.normal(shift, 1, n)
        assert signed_rank_p(d) == pytest.approx(signed_rank_by_hand(d.tolist()), abs=1e-12)


def test_signed_rank_of_differences_of_one_sign_is_two_to_the_one_minus_n():
    for n in (3, 6, 10):
        assert signed_rank_p(np.arange(1, n + 1) / 10) == pytest.approx(2.0 ** (1 - n))


def test_signed_rank_leaves_zeros_out():
    assert signed_rank_p([0, 0, 1, 2, -3, 4]) == pytest.approx(signed_rank_p([1, 2, -3, 4]))


def test_the_bootstrap_agrees_with_loops():
    rng = np.random.default_rng(3)
    d = rng.normal(0.02, 0.05, (3, 12)) + rng.normal(0, 0.03, (3, 1))
    by_hand = bootstrap_by_hand(d.tolist(), 6000, seed=5)
    ours = np.sort(bootstrap_means(d, 20_000, seed=1))
    for q in (0.025, 0.25, 0.5, 0.75, 0.975):
        assert np.quantile(ours, q) == pytest.approx(by_hand[int(q * 6000)], abs=0.003)


def test_the_bootstrap_has_the_variance_of_the_closed_form():
    # E[w] = 1, Var[w_i] = 1 - 1/n, Cov[w_i, w_j] = -1/n for the counts w of a multinomial draw
    rng = np.random.default_rng(4)
    d = rng.normal(0, 1, (4, 7))
    s, k = d.shape
    rows, columns = (np.eye(n) - np.full((n, n), 1 / n) for n in (s, k))
    second = np.einsum("ij,kl,ik,jl->", d, d, rows + 1, columns + 1)  # E[(w d v)^2]
    variance = second / (s * k) ** 2 - d.mean() ** 2
    assert bootstrap_means(d, 60_000).var() == pytest.approx(variance, rel=0.03)


def test_one_seed_is_the_plain_bootstrap_over_cases():
    d = np.random.default_rng(5).normal(0, 1, (1, 30))
    expected = ((d - d.mean()) ** 2).sum() / 30**2
    assert bootstrap_means(d, 40_000).var() == pytest.approx(expected, rel=0.03)


@quick
@given(tables)
def test_a_recipe_against_itself_gives_no_difference(a):
    assert paired_difference(a, a) == (0.0, 0.0, 0.0, 1.0, a.shape[1], a.shape[0])


@quick
@given(tables, st.integers(0, 99))
def test_exchange_flips_the_sign(a, seed):
    b = np.random.default_rng(seed).random(a.shape)
    there = paired_difference(a, b, resamples=300, seed=seed)
    back = paired_difference(b, a, resamples=300, seed=seed)
    assert back.difference == pytest.approx(-there.difference, abs=1e-12)
    assert (back.low, back.high) == pytest.approx((-there.high, -there.low), abs=1e-12)
    assert back.p == pytest.approx(there.p, abs=1e-12)


@quick
@given(tables, st.floats(-0.5, 0.5))
def test_a_constant_difference_is_certain(a, shift):
    d = paired_difference(a + shift, a, resamples=200)
    assert (d.difference, d.low, d.high) == pytest.approx((shift,) * 3, abs=1e-9)


def test_the_draws_are_seeded():
    a, b = np.random.default_rng(0).random((2, 3, 8))
    assert paired_difference(a, b, seed=1) == paired_difference(a, b, seed=1)
    assert paired_difference(a, b, seed=1).low != paired_difference(a, b, seed=2).low


@pytest.mark.parametrize(
    ("scores", "baseline", "more"),
    [
        ([[1.0]], [[1.0, 2.0]], {}),
        ([1.0], [1.0], {}),
        ([[]], [[]], {}),
        ([[float("nan")]], [[1.0]], {}),
        ([[1.0]], [[1.0]], {"resamples": 0}),
    ],
)
def test_what_cannot_be_compared_is_refused(scores, baseline, more):
    with pytest.raises(ValueError, match=r"must|share"):
        paired_difference(scores, baseline, **more)


def rows_of(scores, classes):
    """(recipe, labels, seed, case, class) -> rows."""
    return [
        {"recipe": r, "labels": 5, "seed": s, "case": f"case{k}", "class": c, "dice": scores[r][s][k][i]}
        for r in scores
        for s in range(len(scores[r]))
        for k in range(len(scores[r][s]))
        for i, c in enumerate(classes)
    ]


def test_tables_against_loops():
    rng = np.random.default_rng(6)
    scores = {r: rng.random((3, 7, 2)).tolist() for r in ("x", "y")}
    rows = rows_of(scores, ("organ", "tumour"))
    random.Random(0).shuffle(rows)
    found = {row["class"]: row for row in compare_recipes(rows, ["x", "y"])}
    for i, name in enumerate(("organ", "tumour")):
        d = [scores["y"][s][k][i] - scores["x"][s][k][i] for s in range(3) for k in range(7)]
        assert found[name]["difference"] == pytest.approx(math.fsum(d) / 21)
        per_case = [(d[k] + d[7 + k] + d[14 + k]) / 3 for k in range(7)]
        assert found[name]["p"] == pytest.approx(signed_rank_by_hand(per_case))
        assert found[name]["low"] <= found[name]["difference"] <= found[name]["high"]
    both = (found["organ"]["difference"] + found["tumour"]["difference"]) / 2
    assert found["mean"]["difference"] == pytest.approx(both)
    means = {(row["recipe"], row["class"]): row for row in recipe_means(rows, ["x", "y"])}
    runs = [math.fsum(scores["x"][s][k][1] for k in range(7)) / 7 for s in range(3)]
    assert means["x", "tumour"]["by_seed"] == pytest.approx(runs)
    spread = math.fsum((run - math.fsum(runs) / 3) ** 2 for run in runs)
    assert means["x", "tumour"]["seed_std"] == pytest.approx(math.sqrt(spread / 2))


def test_a_class_without_a_score_is_left_out_for_its_case_in_all_runs():
    scores = {"x": [[[0.5, None], [0.25, 0.5]]], "y": [[[0.75, 0.0], [0.5, 0.5]]]}
    found = {row["class"]: row for row in compare_recipes(rows_of(scores, ("a", "b")), ["x", "y"])}
    assert (found["b"]["difference"], found["b"]["cases"], found["b"]["left_out"]) == (0.0, 1, 1)
    assert found["mean"]["difference"] == pytest.approx((0.25 + 0.125) / 2)
    assert found["mean"]["cases"] == 2


def test_a_class_that_no_case_has_gives_no_figure():
    scores = {"x": [[[0.5, None]]], "y": [[[0.75, None]]]}
    found = {row["class"]: row for row in compare_recipes(rows_of(scores, ("a", "b")), ["x", "y"])}
    assert found["b"]["difference"] is None and found["b"]["cases"] == 0
    assert "no score" in verdict(found["b"])
    assert found["mean"]["difference"] == 0.25


def test_a_missing_run_is_named():
    rows = rows_of({"x": [[[0.5]]], "y": [[[0.5]]]}, ("a",))
    with pytest.raises(ValueError, match="'y'"):
        compare_recipes([row for row in rows if row["recipe"] == "x"], ["x", "y"])
    with pytest.raises(ValueError, match="two"):
        compare_recipes(rows, ["x"])


def test_a_recipe_named_twice_is_the_same():
    rows = rows_of({"x": [[[0.5], [0.25]], [[0.75], [0.5]]]}, ("a",))
    row = compare_recipes(rows, ["x", "x"])[0]
    assert (row["difference"], row["low"], row["high"], row["p"]) == (0, 0, 0, None)
    assert "the same" in verdict(row)


def test_one_seed_is_never_clear():
    row = {
        "difference": 0.02,
        "low": 0.01,
        "high": 0.03,
        "p": 0.001,
        "recipe": "b",
        "baseline": "a",
        "cases": 9,
    }
    assert "clearly" in verdict({**row, "seeds": 3})
    assert "clearly" not in verdict({**row, "seeds": 1})
    assert "worse" in verdict({**row, "low": -0.03, "high": -0.01, "seeds": 1})
