"""The evaluation's ignite metric: mean Dice for the engine, metrics.csv and metrics.json for people."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed
from ignite.engine import Engine
from ignite.metrics import Metric

from medseg_supcon.datasets import snap_labels
from medseg_supcon.errors import DataError, RunError
from medseg_supcon.evaluation.metrics import METRICS, Row, case_metrics
from medseg_supcon.files import write_csv, write_text
from medseg_supcon.scans import one_place, read_volume

EMPTY_RULE = (
    "A class that neither the prediction nor the reference holds has no score and is in no mean "
    "(empty: both). Where one of the two alone is empty, Dice and surface Dice are 0 and HD95 is the "
    "diagonal of the scan."
)
COLUMNS = ("case", "class", *METRICS, "tolerance_mm", "volume_ml", "reference_volume_ml", "empty")


def summarise(rows: Sequence[Row]) -> dict[str, Any]:
    """Statistics per class over cases, and the mean over classes of the classes' means.

    ``classes`` maps a class to its mean ``dice``, ``hd95_mm`` and ``surface_dice``, each also with ``_std``
    (population) and ``_median``, ``n`` (cases with a score) and ``empty`` (cases that the rule for empty
    classes caught, by kind). ``mean`` holds the three scores over ``n`` classes. None: no score.

    Example:
        >>> row = {"case": "a", "class": "organ", "dice": 0.5, "hd95_mm": 2.0, "surface_dice": 1.0}
        >>> summarise([row | {"empty": ""}])["mean"]["dice"]
        0.5
    """
    classes: dict[str, Any] = {}
    for name in dict.fromkeys(row["class"] for row in rows):
        mine = [row for row in rows if row["class"] == name]
        of: dict[str, Any] = {}
        for metric in METRICS:
            of |= _statistics(metric, [row[metric] for row in mine])
        of["n"] = sum(row["dice"] is not None for row in mine)
        kinds = ("both", "prediction", "reference")
        of["empty"] = {kind: sum(row["empty"] == kind for row in mine) for kind in kinds}
        classes[name] = of
    mean: dict[str, Any] = {}
    for metric in METRICS:
        mean[metric] = _statistics(metric, [of[metric] for of in classes.values()])[metric]
    mean["n"] = sum(of["dice"] is not None for of in classes.values())
    return {"cases": len({row["case"] for row in rows}), "mean": mean, "classes": classes}


def metrics_report(rows: Sequence[Row], problems: Sequence[dict[str, str]] = ()) -> dict[str, Any]:
    """What ``metrics.json`` holds. A score that does not exist is None, never NaN.

    Args:
        rows: `case_metrics`' rows, each with a ``case``.
        problems: cases that could not be scored, ``{"case", "problem"}``.
    """
    return {
        "summary": {**summarise(rows), "failed": len(problems)},
        "rule_for_empty_classes": EMPTY_RULE,
        "problems": list(problems),
        "rows": [dict(row) for row in rows],
    }


def write_metrics(rows: Sequence[Row], folder: str | Path) -> dict[str, Any]:
    """Writes ``metrics.csv`` (a row per case and class) and ``metrics.json`` (those, and their summary).

    Args:
        rows: `case_metrics`' rows, each with a ``case``.
        folder: made where it does not exist.

    Returns:
        what the JSON holds.

    Raises:
        RunError: the folder cannot be written to.
    """
    report = metrics_report(rows)
    write_report(report, folder)
    return report


def add_problems(folder: str | Path, problems: Mapping[str, str]) -> dict[str, Any]:
    """Adds cases that could not be scored, name -> why, to the ``metrics.json`` of a folder, and returns its content.

    Raises:
        RunError: the file cannot be written.
    """
    report: dict[str, Any] = json.loads((Path(folder) / "metrics.json").read_text(encoding="utf-8"))
    report["problems"] += [{"case": case, "problem": problem} for case, problem in problems.items()]
    report["summary"]["failed"] = len(report["problems"])
    write_report(report, folder)
    return report


def write_report(report: dict[str, Any], folder: str | Path) -> None:
    """Writes a `metrics_report`; in the CSV a score that does not exist is an empty field.

    Raises:
        RunError: the folder cannot be written to.
    """
    folder = Path(folder)
    columns = [*COLUMNS, *(["trained_on"] if any("trained_on" in row for row in report["rows"]) else [])]
    try:
        write_csv(folder / "metrics.csv", columns, report["rows"])
        write_text(folder / "metrics.json", json.dumps(report, indent=1, allow_nan=False) + "\n")
    except OSError as error:
        raise RunError(
            f"{folder}: the metrics could not be written ({error.strerror}). Choose another --out."
        ) from error


def _statistics(metric: str, values: Sequence[float | None]) -> dict[str, float | None]:
    scored = np.array([v for v in values if v is not None], dtype=np.float64)
    if scored.size == 0:
        return {metric: None, f"{metric}_std": None, f"{metric}_median": None}
    return {
        metric: float(scored.mean()),
        f"{metric}_std": float(scored.std()),
        f"{metric}_median": float(np.median(scored)),
    }


class MetricsReport(Metric):  # type: ignore[misc]  # ignite's stubs are not followed
    """Scores each case in the scan's own grid, and writes ``metrics.csv`` and ``metrics.json`` at the end.

    As an evaluator's ``key_val_metric`` its value is the mean Dice over classes (of the classes' means); NaN
    where no class has a score. With several ranks the rows of all are gathered and rank 0 writes.

    Takes an evaluator's decollated output, dicts with ``pred`` and ``label`` (1, X, Y, Z), MetaTensors on one
    grid in the label files' own values, and ``name`` from its batch.

    Args:
        folder: where the two files go.
        labels: class name -> value in the label files, background first.
        ignore_label: value of the reference that means "not annotated", or None.
        tolerance_mm: of the surface Dice.
        trust_scan_affine: a label map's own affine may differ (``--allow-affine-mismatch``).

    Raises:
        DataError: a label map has another shape or place than its scan, or an undeclared value.
    """

    def __init__(
        self,
        folder: str | Path,
        labels: Mapping[str, float],
        ignore_label: float | None = None,
        tolerance_mm: float = 1.0,
        trust_scan_affine: bool = False,
    ) -> None:
        self.trust_scan_affine = trust_scan_affine
        self.folder, self.labels = Path(folder), dict(labels)
        self.ignore_label, self.tolerance_mm = ignore_label, tolerance_mm
        self.rows: list[Row] = []
        super().__init__()

    def reset(self) -> None:
        """Forgets the cases seen."""
        self.rows = []

    def iteration_completed(self, engine: Engine) -> None:
        """Scores the engine's batch: MONAI's output has no place for the case's name, its batch has."""
        items = zip(engine.state.output, engine.state.batch, strict=True)
        self.update([{**output, "name": case["name"]} for output, case in items])

    def update(self, output: list[dict[str, Any]]) -> None:
        """Scores the cases of one batch."""
        for item in output:
            name, pred, label = str(item["name"]), item["pred"], item["label"]
            affine = np.asarray(pred.affine, dtype=np.float64)
            theirs = None if self.trust_scan_affine else np.asarray(label.affine)
            _check_grids(name, pred.shape[1:], affine, label.shape[1:], theirs)
            self.rows += score_case(
                name,
                pred.cpu().numpy()[0],
                label.cpu().numpy()[0],
                np.linalg.norm(affine[:3, :3], axis=0),
                self.labels,
                self.ignore_label,
                self.tolerance_mm,
            )

    def compute(self) -> float:
        """Writes the report (rank 0) and returns the mean Dice."""
        rows = self.rows
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            gathered: list[Any] = [None] * torch.distributed.get_world_size()
            torch.distributed.all_gather_object(gathered, rows)
            # A sampler that fills up the last batch gives a case to two ranks.
            unique = {(row["case"], row["class"]): row for part in gathered for row in part}
            rows = list(unique.values())
            if torch.distributed.get_rank() != 0:
                return _mean_dice(rows)
        write_metrics(sorted(rows, key=lambda row: str(row["case"])), self.folder)
        return _mean_dice(rows)


def score_mask(
    name: str,
    mask: np.ndarray[Any, Any],
    affine: np.ndarray[Any, Any],
    label_file: Path,
    labels: Mapping[str, float],
    ignore_label: float | None = None,
    tolerance_mm: float = 1.0,
    trust_scan_affine: bool = False,
) -> list[Row]:
    """`case_metrics` of a mask in its scan's grid against a label map's file.

    Args:
        name: the case's.
        mask: (X, Y, Z), the label files' own values.
        affine: (4, 4), the scan's voxel indices to mm.
        label_file: the label map (NIfTI).
        labels: class name -> value, background first.
        ignore_label: value of the label map that means "not annotated", or None.
        tolerance_mm: of the surface Dice.
        trust_scan_affine: the label map's own affine may differ.

    Raises:
        DataError: the label map cannot be read, has another shape or place, or an undeclared value.
    """
    label = read_volume(label_file)
    theirs = None if trust_scan_affine else label.affine_mm
    _check_grids(name, mask.shape, affine, label.data.shape, theirs)
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    return score_case(name, mask, label.data, spacing, labels, ignore_label, tolerance_mm)


def _check_grids(name: str, shape: Any, affine: Any, label_shape: Any, label_affine: Any) -> None:
    """A scan and its label map share one grid; ``label_affine`` None: only their shapes are compared."""
    if tuple(shape) != tuple(label_shape):
        raise DataError(
            f"{name}: the label map is {tuple(label_shape)} and the scan {tuple(shape)} voxels. They must share one "
            "grid; check that they belong together."
        )
    if label_affine is not None and not one_place(shape, affine, label_affine):
        raise DataError(
            f"{name}: the label map lies elsewhere in space than its scan (their affines differ). Correct the header "
            "of the one that is wrong."
        )


def score_case(
    name: str,
    prediction: np.ndarray[Any, Any],
    reference: np.ndarray[Any, Any],
    spacing: Any,
    labels: Mapping[str, float],
    ignore_label: float | None,
    tolerance_mm: float,
) -> list[Row]:
    """`case_metrics` with the case's name, after a check that the reference holds declared values only.

    Values within 1e-3 of a declared one are that one, as in the check and in training.

    Raises:
        DataError: the reference holds a value that ``labels`` does not name.
    """
    declared = [*labels.values(), *([] if ignore_label is None else [ignore_label])]
    prediction, reference = snap_labels(prediction, labels.values()), snap_labels(reference, declared)
    ignore = None if ignore_label is None else reference == ignore_label
    unknown = sorted(set(np.unique(reference).tolist()) - set(declared))
    if unknown:
        raise DataError(
            f"{name}: the label map holds the values {unknown[:5]}, which the data set does not declare "
            f"(declared: {declared}). Add them to the labels or mend the label map."
        )
    rows = case_metrics(prediction, reference, spacing, labels, ignore, tolerance_mm)
    return [{"case": name, **row} for row in rows]


def _mean_dice(rows: list[Row]) -> float:
    mean = summarise(rows)["mean"]["dice"]
    return float("nan") if mean is None else float(mean)
