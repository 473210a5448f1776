"""Summary of scores, ``metrics.csv`` and ``metrics.json``, and the ignite metric that writes them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import numpy as np
from ignite.engine import Engine
from ignite.metrics import Metric

from medseg_supcon.datasets import snap_labels
from medseg_supcon.errors import DataError, RunError
from medseg_supcon.evaluation.metrics import METRICS, Array, Labels, Row, case_metrics
from medseg_supcon.files import write_csv, write_text
from medseg_supcon.scans import read_nifti, same_grid

EMPTY_RULE = (
    "A class that is neither in the prediction nor in the reference has no score and is in no mean (empty: both). If only "
    "one of the two is empty, Dice and surface Dice are 0 and HD95 is the diagonal of the scan."
)
COLUMNS = ("case", "class", *METRICS, "tolerance_mm", "volume_ml", "reference_volume_ml", "empty")


def summarise(rows: Sequence[Row]) -> dict[str, Any]:
    """Statistics per class over cases, and the mean over classes of the classes' means.

    ``classes`` maps a class to its mean ``dice``, ``hd95_mm`` and ``surface_dice``, each also with ``_std`` (population)
    and ``_median``, ``n`` (cases with a score) and ``empty`` (cases with empty masks, by kind). ``mean`` holds the three
    scores over ``n`` classes. None: no score.

    Example:
        >>> row = {"case": "a", "class": "organ", "dice": 0.5, "hd95_mm": 2.0, "surface_dice": 1.0}
        >>> summarise([row | {"empty": ""}])["mean"]["dice"]
        0.5
    """
    classes: dict[str, Any] = {}
    for name in dict.fromkeys(row["class"] for row in rows):
        of_class = [row for row in rows if row["class"] == name]
        empty = {kind: sum(row["empty"] == kind for row in of_class) for kind in ("both", "prediction", "reference")}
        classes[name] = _statistics(of_class) | {"empty": empty}
    mean = {key: value for key, value in _statistics(list(classes.values())).items() if key in (*METRICS, "n")}
    return {"cases": len({row["case"] for row in rows}), "mean": mean, "classes": classes}


def _statistics(rows: Sequence[Row]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for metric in METRICS:
        scored = np.array([row[metric] for row in rows if row[metric] is not None], dtype=np.float64)
        for suffix, statistic in (("", np.mean), ("_std", np.std), ("_median", np.median)):
            result[metric + suffix] = float(statistic(scored)) if scored.size else None
    return result | {"n": sum(row["dice"] is not None for row in rows)}


def metrics_report(rows: Sequence[Row], problems: Sequence[dict[str, str]] = ()) -> dict[str, Any]:
    """What ``metrics.json`` holds; ``problems`` are the cases that have no scores, ``{"case", "problem"}``."""
    summary = summarise(rows) | {"failed": len(problems)}
    return {"summary": summary, "rule_for_empty_classes": EMPTY_RULE, "problems": list(problems), "rows": list(rows)}


def write_metrics(rows: Sequence[Row], folder: str | Path) -> dict[str, Any]:
    """Writes `score_case`'s rows and their summary into a folder, and returns the content of ``metrics.json``."""
    return write_report(metrics_report(rows), folder)


def add_problems(folder: str | Path, problems: Mapping[str, str]) -> dict[str, Any]:
    """Adds cases that have no scores, name -> why, to the ``metrics.json`` of a folder, and returns its content."""
    report: dict[str, Any] = json.loads((Path(folder) / "metrics.json").read_text(encoding="utf-8"))
    report["problems"] += [{"case": case, "problem": problem} for case, problem in problems.items()]
    report["summary"]["failed"] = len(report["problems"])
    return write_report(report, folder)


def write_report(report: dict[str, Any], folder: str | Path) -> dict[str, Any]:
    """Writes a `metrics_report` and returns it; a score that does not exist is an empty field or null, never NaN."""
    folder = Path(folder)
    columns = [*COLUMNS, *(["trained_on"] if any("trained_on" in row for row in report["rows"]) else [])]
    try:
        write_csv(folder / "metrics.csv", columns, report["rows"])
        write_text(folder / "metrics.json", json.dumps(report, indent=1, allow_nan=False) + "\n")
    except OSError as error:
        raise RunError(f"{folder}: metrics could not be written ({error.strerror}). Choose another --out.") from error
    return report


class MetricsReport(Metric):  # type: ignore[misc]  # ignite's stubs are not followed
    """Scores each case in the scan's own grid, and writes ``metrics.csv`` and ``metrics.json`` at the end.

    As an evaluator's ``key_val_metric`` its value is the mean Dice over classes (of the classes' means); NaN if no
    class has a score. Takes the evaluator's decollated output, dicts with ``pred`` and ``label`` (1, X, Y, Z),
    MetaTensors on one grid in the label files' own values, and ``name`` from its batch. With several ranks the rows
    of all are gathered and rank 0 writes.

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
        labels: Labels,
        ignore_label: float | None = None,
        tolerance_mm: float = 1.0,
        trust_scan_affine: bool = False,
    ) -> None:
        self.folder = Path(folder)
        self.options: tuple[Any, ...] = (labels, ignore_label, tolerance_mm, trust_scan_affine)
        super().__init__()

    def reset(self) -> None:
        """Forgets the cases seen."""
        self.rows: list[Row] = []

    def iteration_completed(self, engine: Engine) -> None:
        """Scores the engine's batch: MONAI's output has no place for the case's name, its batch has."""
        cases = zip(engine.state.output, engine.state.batch, strict=True)
        self.update([output | {"name": case["name"]} for output, case in cases])

    def update(self, output: list[dict[str, Any]]) -> None:
        """Scores the cases of one batch."""
        for item in output:
            mask, label = ((item[key].cpu().numpy()[0], np.asarray(item[key].affine)) for key in ("pred", "label"))
            self.rows += score_mask(str(item["name"]), *mask, label, *self.options)

    def compute(self) -> float:
        """Writes the report (rank 0) and returns the mean Dice."""
        # A sampler that fills up the last batch gives a case to two ranks.
        unique = {(row["case"], row["class"]): row for part in idist.all_gather(self.rows) for row in part}
        rows = sorted(unique.values(), key=lambda row: str(row["case"]))
        if idist.get_rank() == 0:
            write_metrics(rows, self.folder)
        mean = summarise(rows)["mean"]["dice"]
        return float("nan") if mean is None else float(mean)


def score_mask(
    name: str,
    mask: Array,
    affine: Array,
    label: Path | tuple[Array, Array],
    labels: Labels,
    ignore_label: float | None,
    tolerance_mm: float,
    trust_scan_affine: bool,
) -> list[Row]:
    """`score_case` after a check that the label map, a NIfTI file or (voxels, affine), is on the mask's grid."""
    if isinstance(label, Path):
        volume = read_nifti(label)
        label = volume.data, volume.affine
    voxels, theirs = label
    if mask.shape != voxels.shape:
        sizes = f"the label map is {voxels.shape} and the scan {mask.shape} voxels"
        raise DataError(f"{name}: {sizes}. They must share one grid; check that they belong together.")
    if not (trust_scan_affine or same_grid(mask.shape, affine, theirs)):
        raise DataError(
            f"{name}: the label map is elsewhere in space than its scan (their affines differ). Correct the wrong header."
        )
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    return score_case(name, mask, voxels, spacing, labels, ignore_label, tolerance_mm)


def score_case(
    name: str, mask: Array, label: Array, spacing: Any, labels: Labels, ignore_label: float | None, tolerance_mm: float
) -> list[Row]:
    """`case_metrics` with the case's name; values within 1e-3 of a declared one are that one, as in training."""
    declared = [*labels.values(), *([] if ignore_label is None else [ignore_label])]
    mask, label = snap_labels(mask, labels.values()), snap_labels(label, declared)
    if unknown := sorted(set(np.unique(label).tolist()) - set(declared)):
        raise DataError(
            f"{name}: the label map holds the values {unknown[:5]}, which the data set does not declare "
            f"(declared: {declared}). Add them to the labels, or correct the label map."
        )
    ignored = None if ignore_label is None else label == ignore_label
    return [{"case": name} | row for row in case_metrics(mask, label, spacing, labels, ignored, tolerance_mm)]
