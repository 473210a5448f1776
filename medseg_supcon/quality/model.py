"""The quality model of a run: from the evidence of a pass to the Dice that the mask probably has, with an interval."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from scipy.stats import median_abs_deviation
from scipy.stats import t as student

from medseg_supcon.errors import RunError
from medseg_supcon.files import write_whole
from medseg_supcon.quality.evidence import Evidence, Floats

FILE = "models/quality.npz"
FORMAT = 1
REFERENCES = 300  # feature vectors per class that are kept
NEIGHBOURS = 5
TREES, SMALLEST_LEAF = 200, 3
COVERAGE = 0.9
BANDWIDTH = 0.04  # of Dice: residuals of masks with about the same predicted Dice give the interval
LOWEST_GOOD = 0.5  # Dice
GAP = 0.1  # of Dice, from the masks of the training scans to those of new scans, where fewer than three scans show it
EMPTY = -9.0  # the value of a score that a class without voxels does not have: below all others


@dataclass(frozen=True)
class Sample:
    """A scan, as it is or degraded, whose true Dice is known.

    Attributes:
        case: the scan's name.
        evidence: of its mask.
        dice: (K - 1,) per foreground class; NaN: in neither the mask nor the label map.
        clean: the scan as it is.
        unseen: the network was not trained on it.
    """

    case: str
    evidence: Evidence
    dice: Floats
    clean: bool
    unseen: bool


@dataclass(frozen=True)
class Estimate:
    """A predicted Dice.

    Attributes:
        dice: (K - 1,) per foreground class.
        mean: over the classes.
        low, high: where the mean of a scan like the training scans is with 90 % probability.
        distance: (K - 1,) mean distance of the mask's feature vectors from the training scans', over the usual one.
    """

    dice: Floats
    mean: float
    low: float
    high: float
    distance: Floats


class Forest:
    """Extremely randomised trees as plain arrays; scikit-learn makes them, numpy applies them.

    Args:
        nodes: (5, n) of feature, threshold, left child, right child (-1: a leaf) and value of all trees' nodes.
        roots: (trees,) their first nodes.
    """

    def __init__(self, nodes: Floats, roots: npt.NDArray[np.int64]) -> None:
        own, (left, right) = np.arange(nodes.shape[1]), nodes[2:4]
        if not (((left == -1) | ((left > own) & (right > own))) & (np.maximum(left, right) < len(own))).all():
            raise ValueError("a tree whose nodes do not lead to a leaf")
        self.nodes, self.roots = nodes, roots

    @classmethod
    def fit(cls, table: Floats, target: Floats, weight: Floats) -> Forest:
        """A forest for rows (n, columns) of scores and their targets (n,)."""
        from sklearn.ensemble import ExtraTreesRegressor  # slow to import

        # random thresholds: better than a random forest on kinds of degradation that are not in the fit
        forest = ExtraTreesRegressor(TREES, min_samples_leaf=SMALLEST_LEAF, random_state=0)
        forest.fit(table, target, sample_weight=weight)
        trees = [tree.tree_ for tree in forest.estimators_]
        roots = np.cumsum([0, *(tree.node_count for tree in trees[:-1])])
        parts = [
            (
                t.feature,
                t.threshold,
                t.children_left + r * (t.children_left >= 0),
                t.children_right + r * (t.children_right >= 0),
                t.value[:, 0, 0],
            )
            for t, r in zip(trees, roots, strict=True)
        ]
        return cls(np.concatenate([np.array(part, dtype=np.float64) for part in parts], axis=1), roots)

    def predict(self, table: Floats) -> Floats:
        """(n, columns) -> (n,)."""
        feature, threshold, left, right, value = self.nodes
        rows = np.arange(len(table))[:, None]
        node = np.tile(self.roots, (len(table), 1))
        table = table.astype(np.float32)  # as scikit-learn compares
        while (inner := left[node] >= 0).any():
            goes_left = table[rows, feature[node].astype(int)] <= threshold[node]
            node = np.where(inner, np.where(goes_left, left[node], right[node]), node).astype(np.int64)
        return np.asarray(value[node].mean(axis=1))


@dataclass(frozen=True)
class Reference:
    """The training scans' evidence, which a new scan's is compared with.

    Attributes:
        volume, intensity, quantiles: median and spread (2, ...) over the training scans, of log ml and as in `Evidence`.
        features: per class (n, F) unit vectors; ``cases`` says from which scan each is.
        distance: (K - 1,) 95th percentile of the training scans' own distances, each from the others.
    """

    volume: Floats
    intensity: Floats
    quantiles: Floats
    features: list[npt.NDArray[np.float32]]
    cases: list[npt.NDArray[np.int64]]

    @classmethod
    def of(cls, clean: Sequence[Evidence]) -> Reference:
        """Of the training scans as they are."""
        per_scan = max(1, REFERENCES // len(clean))
        features, cases = [], []
        for c in range(len(clean[0].volume)):
            parts = [e.features[c] for e in clean]
            parts = [p[np.linspace(0, len(p) - 1, min(per_scan, len(p))).astype(int)] if len(p) else p for p in parts]
            kept = [p for p in parts if len(p)]
            features.append(_unit(np.concatenate(kept)) if kept else np.zeros((0, 0), dtype=np.float32))
            cases.append(np.repeat(np.arange(len(parts)), [len(p) for p in parts]))
        return cls(
            _spread([_log(e.volume[1:]) for e in clean], 0.15),
            _spread([e.intensity[1:] for e in clean], 0.05),
            _spread([e.quantiles for e in clean], 0.05),
            features,
            cases,
        )

    def distances(self, evidence: Evidence, without: int = -1) -> Floats:
        """(K - 1, 4): mean and 90th percentile of the distance of the mask's feature vectors to the k-th nearest
        reference of their class, mean share of it in the sum with that to the nearest other class, and the share of
        vectors that are nearer to another class. ``without`` leaves out the references from one training scan.
        """
        rows = np.full((len(self.features) - 1, 4), np.nan)
        known = [v[cases != without] for v, cases in zip(self.features, self.cases, strict=True)]
        for c, vectors in enumerate(map(_unit, evidence.features)):
            others = [other for k, other in enumerate(known) if k != c and len(other)]
            if c > 0 and len(vectors) and len(known[c]) and others:
                near, far = _kth(known[c], vectors), np.min([_kth(other, vectors) for other in others], axis=0)
                share = near / np.maximum(near + far, 1e-12)
                rows[c - 1] = near.mean(), np.quantile(near, 0.9), share.mean(), np.mean(near > far)
        return rows

    def table(self, evidence: Evidence, distances: Floats) -> Floats:
        """The scores of a mask, (K - 1, columns), of which `distances` gives some; `EMPTY` where a class has no voxels."""
        volume = _log(evidence.volume[1:]) - self.volume[0]
        intensity = np.abs(evidence.intensity[1:] - self.intensity[0]) / self.intensity[1]
        quantiles = np.abs(evidence.quantiles - self.quantiles[0]) / self.quantiles[1]
        own = np.column_stack(
            [
                evidence.probability[1:],
                np.clip(volume, -5, 5),
                np.log1p(evidence.shape[1:]),
                np.log1p(intensity.mean(axis=1)),
                np.log1p(intensity.max(axis=1)),
                distances,
            ]
        )
        own = np.nan_to_num(own, nan=EMPTY)
        whole = np.log1p([quantiles.mean(), quantiles.max()])
        shared = [np.tile(whole, (len(own), 1)), *([np.tile(own.min(axis=0), (len(own), 1))] if len(own) > 1 else [])]
        return np.concatenate([own, *shared], axis=1)


class QualityModel:
    """Predicts the Dice of masks from the evidence of the pass that made them.

    Extremely randomised trees (Geurts et al. 2006) from the scores of a class to its Dice, fitted on the training and
    validation scans as they are and degraded. The interval of the mean Dice is that of Student's t for the residuals of
    masks with about the same predicted Dice, each predicted by a forest that was fitted without its scan; its degrees
    of freedom are the number of scans minus one, those that the network was trained on counted half, so that few scans
    give a wide interval.

    Attributes:
        scans, unseen, samples: numbers of scans, of those among them that the network was not trained on, and of
            their clean and degraded forms, that the model rests on.
        good_from: a mask is good if the lower end of its interval is at least this (Dice): the 5th percentile of the
            validation scans' Dice or, if that is lower, two robust standard deviations below the usual lower end of the
            validation scans as they are (of fewer than three: three below that of all scans, less `GAP`).
    """

    def __init__(self, reference: Reference, forest: Forest, residuals: Floats, facts: dict[str, Any]) -> None:
        self.reference, self.forest = reference, forest
        self.scans, self.unseen, self.samples = (int(facts[key]) for key in ("scans", "unseen", "samples"))
        self.own = tuple(int(number) for number in facts["own"])  # columns, scans and unseen scans without other folds'
        self.good_from, self.usual_distance = float(facts["good_from"]), np.array(facts["usual_distance"], dtype=float)
        self.rest_on(residuals)

    def rest_on(self, residuals: Floats) -> None:
        """Take these ``residuals`` (5, n): predicted Dice, residual, weight, unseen, clean."""
        self.residuals = residuals
        corrected = residuals[3] * self.correction(residuals[0])  # as the prediction for a new scan is
        self.corrected = np.stack([residuals[0] + corrected, residuals[1] - corrected, residuals[2]])

    @classmethod
    def fit(cls, samples: Sequence[Sample]) -> QualityModel:
        """From samples of at least two scans, each also as it is."""
        samples = [s for s in samples if not np.isnan(s.dice).all()]
        names = list(dict.fromkeys(s.case for s in samples if s.clean))
        clean = [next(s for s in samples if s.clean and s.case == name) for name in names]
        samples = [s for s in samples if s.case in names]
        case = np.array([names.index(s.case) for s in samples])
        truth, unseen = np.array([np.nanmean(s.dice) for s in samples]), np.array([s.unseen for s in samples])
        # The Dice of scans that the network was trained on is too high: the others count more, up to three times.
        seen_scans, unseen_scans = (len({s.case for s in samples if s.unseen is flag}) for flag in (False, True))
        weight = np.where(unseen, np.clip(seen_scans / max(1, unseen_scans), 1.0, 3.0), 1.0)

        def fitted(chosen: npt.NDArray[np.bool_], reference: Reference, tables: list[Floats]) -> Forest:
            rows = [(table, s.dice, w) for s, table, w, c in zip(samples, tables, weight, chosen, strict=True) if c]
            dice = np.concatenate([d for _, d, _ in rows])
            known = ~np.isnan(dice)
            weights = np.repeat([w for *_, w in rows], [len(d) for _, d, _ in rows])
            return Forest.fit(np.concatenate([table for table, *_ in rows])[known], dice[known], weights[known])

        reference = Reference.of([s.evidence for s in clean])
        tables = [
            reference.table(s.evidence, reference.distances(s.evidence, without=i))
            for s, i in zip(samples, case, strict=True)
        ]
        predicted = np.zeros(len(samples))
        folds = np.arange(len(names)) % min(5, len(names))
        for fold in range(folds.max() + 1):
            out = folds[case] == fold
            forest = fitted(~out, reference, tables)
            for i in np.flatnonzero(out):
                predicted[i] = forest.predict(tables[i]).mean()
        is_clean = np.array([s.clean for s in samples])
        residuals = np.stack([predicted, truth - predicted, weight, unseen, is_clean])
        facts: dict[str, Any] = {"scans": len(names), "unseen": unseen_scans, "samples": len(samples), "good_from": 0.0}
        facts["own"] = len(samples), len(names), unseen_scans
        own = [reference.distances(s.evidence, without=i)[:, 0] for i, s in enumerate(clean)]
        far = [[d for d in distances if not np.isnan(d)] for distances in zip(*own, strict=True)]
        facts["usual_distance"] = [float(np.percentile(d, 95)) if d else 1.0 for d in far]
        model = cls(reference, fitted(np.ones(len(samples), dtype=bool), reference, tables), residuals, facts)
        model.good_from = model.usual_low()
        return model

    @classmethod
    def pool(cls, models: Sequence[QualityModel]) -> None:
        """Give the models of a data set's folds each other's residuals of scans that their networks were not trained on.

        So the interval, the correction and the threshold of each rest on all scans. Pooling twice changes nothing.
        """
        own = [model.residuals[:, : model.own[0]] for model in models]
        for number, model in enumerate(models):
            others = [part[:, part[3] == 1] for index, part in enumerate(own) if index != number]
            model.unseen = sum(one.own[2] for one in models)
            model.scans = max(model.own[1], model.unseen)
            model.rest_on(np.concatenate([own[number], *others], axis=1))
            model.good_from = model.usual_low()

    def usual_low(self) -> float:
        """The lower end of the interval from which on a mask is good (`good_from`)."""
        predicted, residual, _, unseen, _ = self.residuals[:, self.residuals[4] == 1]
        lows = np.array([self.interval(p)[0] for p in predicted + self.correction(predicted)])
        new = unseen == 1  # the masks of the others are better than those of new scans
        enough = new.sum() >= 3
        usual = min(np.median(lows), np.median(lows[new])) if enough else np.median(lows) - GAP
        usual -= (2 if enough else 3) * median_abs_deviation(lows, scale="normal")  # one odd scan counts little
        usual = min(usual, np.percentile((predicted + residual)[new], 5)) if new.any() else usual
        return float(max(usual, LOWEST_GOOD))

    def interval(self, predicted: float) -> tuple[float, float]:
        """Where the mean Dice is with 90 % probability, for a corrected prediction."""
        at, residual, weight = self.corrected
        weight = weight * np.exp(-((at - predicted) ** 2) / (2 * BANDWIDTH**2)) + 1e-12
        spread = np.sqrt(np.average(residual**2, weights=weight))
        scans = max(2.0, (self.scans + self.unseen) / 2)
        half = student.ppf((1 + COVERAGE) / 2, scans - 1) * np.sqrt(1 + 1 / scans) * spread
        return float(max(0.0, predicted - half)), float(min(1.0, predicted + half))

    def correction(self, predicted: Floats) -> Floats:
        """(n,) for each: the mean residual of scans that are new to the network, if negative; shrunk if they are few."""
        at, residual, _, unseen, _ = self.residuals
        weight = np.exp(-((at - predicted[:, None]) ** 2) / (2 * (2.5 * BANDWIDTH) ** 2)) + 1e-12
        mean = weight @ (unseen * residual) / np.maximum(weight @ unseen, 1e-300)
        return np.asarray(np.minimum(0.0, mean) * self.unseen / (self.unseen + 2))

    def estimate(self, evidence: Evidence) -> Estimate:
        """The probable Dice of a mask."""
        distances = self.reference.distances(evidence)
        dice = self.forest.predict(self.reference.table(evidence, distances))
        dice = np.clip(dice + self.correction(dice[None].mean(axis=1)), 0, 1)
        mean = float(dice.mean())
        return Estimate(dice, mean, *self.interval(mean), distances[:, 0] / self.usual_distance)

    def save(self, run: Path) -> None:
        """Write ``models/quality.npz``: arrays and numbers alone."""
        reference, facts = self.reference, {"format": FORMAT}
        facts |= {key: getattr(self, key) for key in ("scans", "unseen", "samples", "good_from", "own")}
        facts["usual_distance"] = self.usual_distance.tolist()
        arrays: dict[str, npt.NDArray[Any]] = {
            "facts": np.array(json.dumps(facts)),
            "nodes": self.forest.nodes.astype(np.float64),
            "roots": self.forest.roots,
            "residuals": self.residuals,
            **{name: getattr(reference, name) for name in ("volume", "intensity", "quantiles")},
        }
        for c, (vectors, cases) in enumerate(zip(reference.features, reference.cases, strict=True)):
            arrays |= {f"features_{c}": vectors.astype(np.float32), f"cases_{c}": cases}
        write_whole(run / FILE, lambda file: np.savez_compressed(file, allow_pickle=False, **arrays))

    @classmethod
    def load(cls, run: str | Path) -> QualityModel | None:
        """That of a run, or None if it has none; `RunError` if the file is damaged."""
        path = Path(run) / FILE
        if not path.is_file():
            return None
        try:
            with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
                facts = json.loads(str(arrays["facts"]))
                if facts["format"] != FORMAT:
                    raise ValueError(f"format {facts['format']}")
                classes = sum(name.startswith("features_") for name in arrays)
                features = [arrays[f"features_{c}"] for c in range(classes)]
                cases = [arrays[f"cases_{c}"] for c in range(classes)]
                reference = Reference(arrays["volume"], arrays["intensity"], arrays["quantiles"], features, cases)
                return cls(reference, Forest(arrays["nodes"], arrays["roots"]), arrays["residuals"], facts)
        except Exception as error:  # numpy and zipfile raise many kinds
            raise RunError(
                f"{path} is damaged, or of another version of medseg ({type(error).__name__}: {str(error)[:100]}). Copy it "
                "again, or pass --no-quality."
            ) from error


def _log(volume: Floats) -> Floats:
    return np.log(np.maximum(volume, 1e-4))


def _unit(vectors: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12) if len(vectors) else vectors


def _spread(values: Sequence[Floats], least: float) -> Floats:
    """Median and standard deviation over the scans, (2, ...); NaN and ``least`` where no scan has a value."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of empty slices
        return np.stack([np.nanmedian(values, axis=0), np.fmax(np.nanstd(values, axis=0), least)])


def _kth(known: npt.NDArray[np.float32], vectors: npt.NDArray[np.float32]) -> Floats:
    """Distance of each unit vector to the k-th nearest known one, or to the farthest of fewer."""
    # with torch's threads, which are awake: numpy's own would take turns with them, 50 ms a scan on two cores
    cosines = torch.from_numpy(vectors).double() @ torch.from_numpy(known).double().T
    nearest = cosines.topk(min(NEIGHBOURS, len(known)), dim=1).values[:, -1]
    return np.asarray((2 - 2 * nearest).clamp(min=0).sqrt())
