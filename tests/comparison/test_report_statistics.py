"""Every number in a comparison's tables, recomputed from its rows with numpy and scipy only."""

from __future__ import annotations

import csv
import re

import numpy as np
import pytest
from scipy import stats

from medseg_supcon.comparison import (
    Results,
    answer,
    caveats,
    compare_recipes,
    on_degraded_scans,
    verdict,
    write_comparison,
)
from medseg_supcon.comparison.report import settings_and_wiring, with_changes

RECIPES, CLASSES, SEEDS, CASES = ("base", "same", "other"), ("organ", "tumour"), (0, 1, 4), range(9)


def made_rows():
    """``same`` repeats ``base``; ``other`` differs by scan and by seed; one scan has no tumour."""
    rng = np.random.default_rng(8)
    hard, lucky = rng.normal(0, 0.08, (9, 2)), rng.normal(0, 0.02, (3, 3))
    noise = rng.normal(0, 0.02, (3, 3, 9, 2))
    rows = []
    for labels in (4, 12):
        for r, recipe in enumerate(RECIPES):
            for s, seed in enumerate(SEEDS):
                for k in CASES:
                    for c, name in enumerate(CLASSES):
                        i = r if recipe == "other" else 0
                        dice = 0.6 + 0.01 * labels + hard[k, c] + lucky[i, s] + noise[i, s, k, c] + 0.03 * i / 2
                        empty = name == "tumour" and k == 3
                        row = {
                            "recipe": recipe,
                            "labels": labels,
                            "seed": seed,
                            "case": f"c{k}",
                            "class": name,
                        }
                        rows.append(row | {"dice": None if empty else float(dice)})
    return rows


def tables(rows, recipe, labels, name):
    """(seeds, cases), of a class or of the mean over the classes that a case has."""
    found = np.full((len(SEEDS), len(CASES)), np.nan)
    for s, seed in enumerate(SEEDS):
        for k in CASES:
            mine = [
                r["dice"]
                for r in rows
                if (r["recipe"], r["labels"], r["seed"], r["case"]) == (recipe, labels, seed, f"c{k}")
                and name in ("mean", r["class"])
                and r["dice"] is not None
            ]
            if mine:
                found[s, k] = np.mean(mine)
    return found[:, ~np.isnan(found[0])]


def two_level_bootstrap(d, resamples=4000, seed=99):
    """Scans and seeds drawn with replacement, index by index."""
    rng = np.random.default_rng(seed)
    means = np.empty(resamples)
    for i in range(resamples):
        rows = rng.integers(0, d.shape[0], d.shape[0])
        columns = rng.integers(0, d.shape[1], d.shape[1])
        means[i] = d[np.ix_(rows, columns)].mean()
    return np.percentile(means, [2.5, 97.5])


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    out, rows = tmp_path_factory.mktemp("written"), made_rows()
    run = {"steps": 10, "minutes": 2.0, "memory_gib": 1.5, "machine": "cpu", "test_hd95_mm": 2.0}
    run |= {"test_dice": 0.6, "validation_dice": 0.6, "loss": 1.0, "contrastive_loss": None, "epochs": 2}
    runs = [run | {"recipe": r, "labels": n, "seed": s} for r in RECIPES for n in (4, 12) for s in SEEDS]
    history = [{"epoch": float(e), "loss": 1.0, "val_mean_dice": 0.5} for e in (1, 2)]
    histories = [{"recipe": r, "labels": n, "seed": 0, "history": history} for r in RECIPES for n in (4, 12)]
    split = {"training": ["t"], "validation": ["v"], "unlabelled": []}
    about = {
        "dataset": "made", "recipes": list(RECIPES), "classes": list(CLASSES), "settings": ["a=<b>"],
        "overlays": {r: {"contrast_weight": 0.1, "train::loss": "$@loss"} for r in RECIPES},
        "descriptions": {"base": "what <it> is.", "same": "", "other": ""}, "patch_size": [8, 8, 8],
        "seeds": list(SEEDS), "splits": {4: split, 12: split}, "test": [f"c{k}" for k in CASES],
        "tested_on": "made up", "epochs": 2, "steps": 10, "patches_per_step": 4, "warnings": [],
        "axes": {}, "variants": [{"name": "", "levels": {}, "settings": {}}],
    }  # fmt: skip
    scores = {"clean": rows, "noise": rows}
    return out, rows, write_comparison(out, Results(about, scores, runs, histories))


def read(path):
    with path.open(newline="") as stream:
        return list(csv.DictReader(stream))


def test_every_comparison_that_is_shown_is_counted(written):
    out, _, found = written
    (said,) = [text for text in found["caveats"] if "comparisons of the mean" in text]
    by_class = read(out / "differences.csv")
    plain = [row for row in by_class if row["class"] == "mean"]
    worse = [row for row in found["robustness"] if row["condition"] == "noise"]
    assert len(plain) == len(worse) == 4
    assert said.startswith(
        "8 comparisons of the mean (4 on the scans as they are, 4 on degraded scans), not counting those of single"
    )
    without = caveats(found["about"], found["differences"])
    assert any(text.startswith("4 comparisons of the mean, not counting those of single classes") for text in without)
    means = [row for row in found["differences"] if row["class"] == "mean"]
    assert any(text.startswith("4 comparisons of the mean: even") for text in caveats(found["about"], means))
    alone = caveats(found["about"], means[:1], found["robustness"][:1])
    assert not any("comparisons" in text for text in alone)


def test_a_table_of_many_classes_wraps_instead_of_scrolling(written):
    page = (written[0] / "report.html").read_text(encoding="utf-8")
    deviations = re.findall(r"<td([^>]*)>[^<]*± ", page)
    assert len(deviations) == 2 * 3 * 3  # budgets, recipes, classes and their mean
    assert not any("n" in kind.replace("class", "") for kind in deviations) and "td.n { white-space: nowrap; }" in page


def test_differences_intervals_and_p(written):
    out, rows, _ = written
    found = read(out / "differences.csv")
    assert len(found) == 2 * 2 * 3
    hidden = 0
    for row in found:
        key = int(row["labels"]), row["class"]
        d = tables(rows, row["recipe"], *key) - tables(rows, "base", *key)
        assert float(row["difference"]) == pytest.approx(d.mean(), abs=1e-12)
        assert (int(row["cases"]), int(row["seeds"])) == (d.shape[1], 3)
        assert int(row["left_out"]) == (1 if row["class"] == "tumour" else 0)
        if row["recipe"] == "same":  # a recipe against itself
            assert [float(row[key]) for key in ("difference", "low", "high", "p")] == [0, 0, 0, 1]
            continue
        low, high = two_level_bootstrap(d)
        assert float(row["low"]) == pytest.approx(low, abs=0.06 * (high - low))
        assert float(row["high"]) == pytest.approx(high, abs=0.06 * (high - low))
        p = stats.wilcoxon(d.mean(axis=0)).pvalue
        if p < 0.05 and float(row["low"]) <= 0 <= float(row["high"]):
            hidden += 1
            assert row["p"] == "", "a p over scans alone does not contradict the interval"
        else:
            assert float(row["p"]) == pytest.approx(p, rel=1e-9)
    assert hidden < len(found) / 2


def test_degraded_scans_are_in_the_answer(written):
    out, _, found = written
    worse = [sentence for sentence in found["answers"] if "on degraded scans" in sentence]
    itself = [sentence for sentence in worse if "same and base" in sentence]
    assert len(itself) == 2 and all("no clear difference" in sentence for sentence in itself)
    worse = [sentence for sentence in worse if sentence not in itself]
    assert len(worse) == 2, "budgets"
    for row in found["robustness"]:
        if row["condition"] == "noise" and row["recipe"] == "other":
            sentence = next(s for s in worse if f"With {row['labels']} " in s and row["recipe"] in s)
            clear = row["low"] > 0 or row["high"] < 0
            assert (f"{100 * row['difference']:+.2f}" in sentence) == clear == ("no clear" not in sentence)
            assert sentence in (out / "summary.md").read_text() and sentence in (out / "report.html").read_text()
    assert any("against base" in sentence for sentence in worse)


@pytest.mark.parametrize(
    ("seeds", "cases", "told"),
    [
        (5, 6, "with noise."),
        (1, 6, ", with 1 seed: too few to be sure."),
        (5, 2, ", with 2 test scans: too few to be sure."),
    ],
)
def test_too_few_seeds_or_scans_are_said_of_degraded_scans_too(seeds, cases, told):
    row = {"labels": 8, "recipe": "b", "baseline": "a", "difference": 0.02, "low": 0.01, "high": 0.03}
    (said,) = on_degraded_scans([row | {"condition": "noise", "seeds": seeds, "cases": cases}])
    assert "b against a +2.00" in said and said.endswith(told)


def test_the_interval_is_wider_than_one_that_takes_seeds_for_scans(written):
    _, rows, found = written
    row = next(r for r in found["differences"] if (r["recipe"], r["labels"], r["class"]) == ("other", 4, "mean"))
    d = (tables(rows, "other", 4, "mean") - tables(rows, "base", 4, "mean")).ravel()[None]
    low, high = two_level_bootstrap(d)
    assert row["high"] - row["low"] > 1.3 * (high - low)


def test_means_over_seeds(written):
    out, rows, _ = written
    for row in read(out / "summary.csv"):
        runs = tables(rows, row["recipe"], int(row["labels"]), row["class"]).mean(axis=1)
        assert float(row["dice"]) == pytest.approx(runs.mean())
        assert float(row["seed_std"]) == pytest.approx(runs.std(ddof=1))


def test_the_page_says_who_won_and_escapes_what_it_is_given(written):
    out, _, found = written
    html = (out / "report.html").read_text()
    assert "same and base give the same result" in html and "&lt;it&gt;" in html and "a=&lt;b&gt;" in html
    assert html.count("What &lt;it&gt; is.") == 1 and "1 key to connect its parts" in html
    assert all(s.startswith("data:image/png;base64,") for s in re.findall(r'src="([^"]*)', html))
    assert (out / "pictures" / "differences_by_class.png").stat().st_size > 5000
    assert len(found["answers"]) == 4 + 4 and "give the same" in found["answers"][0]
    assert "1.50" in html


def test_sentences():
    nothing = {"recipe": "b", "baseline": "a", "labels": 3, "difference": None}
    assert answer(nothing) == "With 3 labelled scans: b and a have no score to compare."
    wiring = {"x": {"y": ["$z"], "w": "@v"}, "n": 1}
    assert settings_and_wiring(wiring) == ({"n": 1}, {"x": wiring["x"]})


@pytest.mark.parametrize(
    ("seeds", "cases", "says"),
    [
        (3, 6, "b is clearly better than a"),
        (1, 6, "b is better than a with 1 seed: too few to be sure"),
        (2, 9, "b is better than a with 2 seeds: too few to be sure"),
        (3, 2, "b is better than a with 2 test scans: too few to be sure"),
        (1, 1, "b is better than a with 1 seed and 1 test scan: too few to be sure"),
    ],
)
def test_nothing_is_clear_from_a_handful(seeds, cases, says):
    row = {"recipe": "b", "baseline": "a", "difference": 0.02, "low": 0.01, "high": 0.03, "p": None}
    assert verdict(row | {"seeds": seeds, "cases": cases}) == says


def test_p_never_contradicts_the_verdict():
    """12 scans that all gain under one seed and lose under another: p over scans is tiny, and no evidence."""
    rng = np.random.default_rng(0)
    for seeds, gains in ((2, (0.06, -0.02)), (3, (0.09, -0.03, -0.02)), (3, (0.03, 0.031, 0.029))):
        rows = []
        for seed in range(seeds):
            for k in range(12):
                base = {"labels": 5, "seed": seed, "case": f"c{k:02d}", "class": "organ"}
                rows.append(base | {"recipe": "a", "dice": 0.5})
                rows.append(base | {"recipe": "b", "dice": 0.5 + gains[seed] + rng.normal(0, 0.001)})
        row = compare_recipes(rows, ["a", "b"])[0]
        if min(gains) > 0:
            assert row["p"] < 0.001 and "clearly better" in answer(row) and "p = 0.000" in answer(row)
        else:
            assert row["p"] is None and "p =" not in answer(row) and "clearly" not in answer(row)
    weak = row | {"p": 0.2}
    assert verdict(weak) == "b is better than a, but not clearly"


def test_scans_without_structures_that_only_noise_fills():
    """No recipe has a score on the clean scans (all are correctly left empty); under noise each one finds something."""
    row = {"labels": 1, "recipe": "b", "baseline": "a", "low": 0.0, "high": 0.0, "p": 1.0, "seeds": 1}
    none, zero = ({"dice": d, "baseline_dice": d, "difference": d} for d in (None, 0.0))
    clean, noise = row | none | {"condition": "clean"}, row | zero | {"condition": "noise", "cases": 1}
    assert [r["dice_change"] for r in with_changes([clean, noise], ["a", "b"])] == [None, None]
    assert answer(clean) == "With 1 labelled scan: b and a have no score to compare."
    assert "1 test scan, 1 seed)" in answer(noise)


EVIL = "=a|<script>x()</script>`b` $x_{$\n# c"


@pytest.mark.parametrize("grid", [False, True])
def test_names_with_special_signs_are_shown_as_they_are(grid, tmp_path):
    rng = np.random.default_rng(1)
    levels = {f"axis{EVIL}": {f"{level}{EVIL}": {"k": EVIL} for level in "st"}} if grid else {}
    variants = [{"name": name, "levels": {axis: name}} for axis in levels for name in levels[axis]]
    variants = variants or [{"name": "", "levels": {}}]
    rows, runs, histories = [], [], []
    for variant in variants:
        for recipe in ("base", f"r{EVIL}"):
            key = {"variant": variant["name"]} if grid else {}
            key |= {"recipe": recipe, "labels": 3, "seed": 0}
            for case in (EVIL, "d"):
                for name in (EVIL, "organ"):
                    rows.append(key | {"case": case, "class": name, "dice": rng.random()})
            scores = dict.fromkeys(("test_dice", "test_hd95_mm", "validation_dice", "loss"), 0.5)
            cost = {"epochs": 1, "steps": 1, "minutes": 1.0, "memory_gib": None, "machine": EVIL}
            runs.append(key | scores | {"contrastive_loss": -0.5} | cost)
            histories.append(key | {"history": [{"epoch": 1.0, "loss": 1.0, "val_mean_dice": 0.5}]})
    recipes = ["base", f"r{EVIL}"]
    split = {"training": [EVIL], "validation": ["v"], "unlabelled": []}
    about = {
        "dataset": EVIL, "recipes": recipes, "classes": [EVIL, "organ"], "settings": [EVIL], "seeds": [0],
        "overlays": {r: {EVIL: EVIL} for r in recipes}, "descriptions": dict.fromkeys(recipes, EVIL),
        "patch_size": [8, 8, 8], "splits": {3: split}, "test": [EVIL, "d"], "tested_on": EVIL, "epochs": 1,
        "steps": 1, "patches_per_step": 4, "warnings": [EVIL], "axes": levels, "variants": variants,
    }  # fmt: skip
    report = write_comparison(tmp_path, Results(about, {"clean": rows, "noise": rows}, runs, histories))
    assert len(report["robustness"]) == 2 * len(variants)
    html, text = ((tmp_path / name).read_text() for name in ("report.html", "summary.md"))
    assert "<script" not in html and "<script" not in text
    assert not re.search(r"^# c", text, re.MULTILINE) and "1 epoch," in text and "1 step of" in text
    head = None
    for line in text.splitlines():
        columns = line.replace("\\|", "").count("|") if line.startswith("|") else None
        assert head is None or columns is None or columns == head, line
        head = columns
    for path in tmp_path.glob("*.csv"):
        cells = [cell for row in read(path) for pair in row.items() for cell in pair]
        assert not any(cell.startswith(("=", "+", "@")) for cell in cells), path
        assert all(float(cell) < 0 for cell in cells if cell.startswith("-")), path
