"""The quality model: its forest against scikit-learn's, its distances and intervals against loops, its file."""

from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy import stats
from sklearn.ensemble import ExtraTreesRegressor

from medseg_supcon.errors import RunError
from medseg_supcon.quality import Evidence, QualityModel, Sample
from medseg_supcon.quality.model import BANDWIDTH, Forest, Reference


def evidence(rng: np.random.Generator, quality: float, classes: int = 3) -> Evidence:
    """What a mask of some quality (0 to 1) could look like: worse, less sure and with other features."""
    shift = (1 - quality) * 3
    return Evidence(
        volume=np.exp(rng.normal(shift, 0.1, classes)),
        probability=np.column_stack(
            [rng.normal(0.6 + 0.3 * quality, 0.02, (classes, 3)), rng.normal(0, 0.01, classes)]
        ),
        shape=np.abs(rng.normal(1, 0.1, (classes, 4))),
        intensity=rng.normal(shift, 0.1, (classes, 2)),
        quantiles=rng.normal(0, 0.1, 7),
        size=np.full(3, 50.0),
        features=[
            (rng.normal(0, 0.1, (40, 6)) + np.eye(6)[c] + shift * np.eye(6)[5]).astype(np.float32)
            for c in range(classes)
        ],
    )


def samples(scans: int = 8, forms: int = 12, worse: float = 0.0) -> list[Sample]:
    """The first two scans are new to the network, and their masks worse by as much."""
    rng, made = np.random.default_rng(0), []
    for scan in range(scans):
        for form in range(forms):
            quality = 0.9 if form == 0 else rng.random() * 0.9
            dice = np.clip(quality - worse * (scan < 2) + rng.normal(0, 0.03, 2), 0, 1)
            made.append(Sample(f"scan {scan}", evidence(rng, quality), dice, form == 0, scan < 2))
    return made


@pytest.fixture(scope="module")
def model() -> QualityModel:
    return QualityModel.fit(samples())


def test_the_forest_gives_what_scikit_learns_gives() -> None:
    rng = np.random.default_rng(1)
    table, target = rng.normal(size=(300, 7)), rng.random(300)
    oracle = ExtraTreesRegressor(200, min_samples_leaf=3, random_state=0)
    oracle.fit(table, target, sample_weight=np.ones(300))
    new = rng.normal(size=(50, 7))
    assert Forest.fit(table, target, np.ones(300)).predict(new) == pytest.approx(oracle.predict(new))


def test_distances_are_those_of_a_loop() -> None:
    rng = np.random.default_rng(2)
    clean = [evidence(rng, 0.9) for _ in range(4)]
    reference, new = Reference.of(clean), evidence(rng, 0.5)
    unit = [[v / np.linalg.norm(v) for v in vectors.astype(float)] for vectors in new.features]
    for without in (-1, 2):
        result = reference.distances(new, without)
        for c in (1, 2):
            known = [
                [r for r, k in zip(reference.features[o], reference.cases[o], strict=True) if k != without]
                for o in range(3)
            ]
            near = [sorted(np.linalg.norm(v - r) for r in known[c])[4] for v in unit[c]]
            far = [min(sorted(np.linalg.norm(v - r) for r in known[o])[4] for o in range(3) if o != c) for v in unit[c]]
            share = np.mean([a / (a + b) for a, b in zip(near, far, strict=True)])
            expected = [
                np.mean(near),
                np.quantile(near, 0.9),
                share,
                np.mean([a > b for a, b in zip(near, far, strict=True)]),
            ]
            assert result[c - 1] == pytest.approx(expected, abs=1e-5)


def test_predicts_the_dice_of_new_masks_within_its_intervals(model: QualityModel) -> None:
    rng = np.random.default_rng(3)
    truth = rng.random(80) * 0.9
    estimates = [model.estimate(evidence(rng, q)) for q in truth]
    assert np.abs([e.mean - q for e, q in zip(estimates, truth, strict=True)]).mean() < 0.06
    assert np.mean([e.low <= q <= e.high for e, q in zip(estimates, truth, strict=True)]) >= 0.8
    assert model.scans == 8 and model.unseen == 2 and model.samples == 96
    good, bad = ([model.estimate(evidence(rng, q)) for _ in range(40)] for q in (0.9, 0.1))
    assert np.mean([e.low >= model.good_from for e in good]) >= 0.85
    assert not any(e.low >= model.good_from for e in bad)
    assert min(e.distance.min() for e in bad) > 1.5 > max(e.distance.max() for e in good)


def half_width(rows: list[list[float]], unseen: int, scans: float, around: float) -> float:
    """Of the interval around a corrected prediction: rows of predicted, residual, weight, unseen, clean."""

    def near(a: float, b: float, width: float) -> float:
        return float(np.exp(-((a - b) ** 2) / (2 * width**2)))

    def correction(at: float) -> float:
        new = [(near(row[0], at, 2.5 * BANDWIDTH), row[1]) for row in rows if row[3] == 1]
        return min(0.0, sum(w * r for w, r in new) / sum(w for w, _ in new)) * unseen / (unseen + 2)

    left = [(row[2], row[0], row[1], correction(row[0]) if row[3] == 1 else 0.0) for row in rows]
    weights = [weight * near(at + change, around, BANDWIDTH) for weight, at, _, change in left]
    squares = [(residual - change) ** 2 for _, _, residual, change in left]
    spread = (sum(w * q for w, q in zip(weights, squares, strict=True)) / sum(weights)) ** 0.5
    return float(stats.t(df=scans - 1).ppf(0.95) * (1 + 1 / scans) ** 0.5 * spread)


@pytest.mark.parametrize("worse", [0.0, 0.2])
def test_the_interval_is_students_with_local_residuals(worse: float) -> None:
    model = QualityModel.fit(samples(worse=worse))
    half = half_width(model.residuals.T.tolist(), 2, 5, 0.7)  # two unseen scans and six seen ones, counted half
    assert model.interval(0.7) == pytest.approx((0.7 - half, min(1.0, 0.7 + half)))


def test_the_interval_is_about_the_corrected_prediction() -> None:
    """A shift that the correction takes away does not widen it a second time."""
    model = QualityModel.fit(samples(forms=40, worse=0.2))
    shift = model.correction(np.array([0.7]))
    about_the_raw_one = np.sqrt(np.mean(model.residuals[1] ** 2))
    assert -0.15 < shift[0] < -0.04
    assert np.sqrt(np.mean(model.corrected[1] ** 2)) < 0.85 * about_the_raw_one


@pytest.mark.parametrize(("new", "error"), [(0.88, 0.01), (0.95, 0.01), (0.4, 0.4)])
def test_good_is_what_a_new_scan_can_reach(new: float, error: float) -> None:
    """Seven training scans, whose masks are too good, and one for validation: one like them, a better or an odd one."""
    model = QualityModel.fit(samples())
    rows = [[0.95 + 0.002 * k, 0.01, 1.0, 0.0, 1.0] for k in range(-3, 4)] + [[new, error, 3.0, 1.0, 1.0]]
    model.rest_on(np.array(rows).T)
    threshold = model.usual_low()
    assert [model.interval(p)[0] >= threshold for p in (0.89, 0.7)] == [True, False]


def test_few_scans_give_wider_intervals() -> None:
    widths = [np.subtract(*QualityModel.fit(samples(n)).interval(0.7)[::-1]) for n in (3, 12)]
    assert widths[0] > 1.3 * widths[1]


def test_folds_share_their_unseen_scans(tmp_path: Path) -> None:
    """Three folds of six scans: each model gets the others' residuals of scans that their networks did not see."""
    every = samples(6, forms=6)
    folds = [[replace(s, unseen=int(s.case[-1]) % 3 == fold) for s in every] for fold in range(3)]
    models = [QualityModel.fit(fold) for fold in folds]
    own = [model.residuals.T.tolist() for model in models]
    QualityModel.pool(models)
    wider = models[1].residuals
    assert wider.T.tolist() == own[1] + [row for k in (0, 2) for row in own[k] if row[3] == 1]
    assert wider.shape[1] == 36 + 2 * 12 and (models[1].scans, models[1].unseen) == (6, 6)
    half = half_width(wider.T.tolist(), 6, 6, 0.7)
    assert models[1].interval(0.7) == pytest.approx((0.7 - half, min(1.0, 0.7 + half)))
    good_from = models[1].good_from
    (tmp_path / "models").mkdir()
    models[1].save(tmp_path)
    again = [models[0], QualityModel.load(tmp_path), models[2]]
    QualityModel.pool(again)
    assert np.array_equal(again[1].residuals, wider) and again[1].good_from == good_from


def test_a_class_that_a_mask_lacks_and_one_that_no_scan_has(model: QualityModel) -> None:
    rng = np.random.default_rng(4)
    full = evidence(rng, 0.9)
    nothing = replace(
        full,
        volume=np.array([1.0, 0.0, 1.0]),
        features=[full.features[0], np.zeros((0, 0), np.float32), full.features[2]],
    )
    nothing.probability[1] = nothing.shape[1] = nothing.intensity[1] = np.nan
    assert np.isfinite(model.estimate(nothing).dice).all()
    lost = [replace(s, evidence=replace(nothing, volume=s.evidence.volume)) for s in samples()]  # a class in no mask
    assert np.isfinite(QualityModel.fit(lost).estimate(nothing).dice).all()
    never = [replace(s, dice=np.array([s.dice[0], np.nan])) for s in samples()]
    assert np.isfinite(QualityModel.fit(never).estimate(full).dice).all()


def test_the_file_holds_the_same_model_without_any_pickle(model: QualityModel, tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    assert QualityModel.load(tmp_path) is None
    model.save(tmp_path)
    loaded, new = QualityModel.load(tmp_path), evidence(np.random.default_rng(5), 0.6)
    assert loaded is not None and loaded.good_from == model.good_from
    one, two = model.estimate(new), loaded.estimate(new)
    assert (one.mean, one.low, one.high) == (two.mean, two.low, two.high) and np.array_equal(one.dice, two.dice)
    content = (tmp_path / "models" / "quality.npz").read_bytes()
    assert len(content) < 2_000_000


@pytest.mark.parametrize("fault", ["cut", "text", "pickle", "cycle", "version"])
def test_a_damaged_or_hostile_file_is_refused_in_a_sentence(model: QualityModel, tmp_path: Path, fault: str) -> None:
    (tmp_path / "models").mkdir()
    path = tmp_path / "models" / "quality.npz"
    model.save(tmp_path)
    with np.load(path) as file:
        arrays = dict(file)
    if fault == "cut":
        path.write_bytes(path.read_bytes()[:1000])
    elif fault == "text":
        path.write_text("no arrays")
    elif fault == "pickle":
        path.write_bytes(pickle.dumps({"facts": 1}))
    elif fault == "cycle":
        inner = int(np.flatnonzero(arrays["nodes"][2] >= 0)[0])
        arrays["nodes"][2, inner] = inner
    elif fault == "version":
        arrays["facts"] = np.array(str(arrays["facts"]).replace('"format": 1', '"format": 99'))
    if fault in ("cycle", "version"):
        np.savez(path, **arrays)
    with pytest.raises(RunError, match=r"quality\.npz is damaged, or of another version"):
        QualityModel.load(tmp_path)
