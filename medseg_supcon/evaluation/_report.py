"""The evaluation's ignite metric: mean Dice for the engine, metrics.csv and metrics.json for people."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed
from ignite.engine import Engine
from ignite.metrics import Metric

from medseg_supcon.data import one_place, snap_labels
from medseg_supcon.errors import DataError
from medseg_supcon.evaluation._metrics import Row, case_metrics
from medseg_supcon.evaluation._summary import summarise, write_metrics


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
            if pred.shape != label.shape:
                raise DataError(
                    f"{name}: the label map is {tuple(label.shape[1:])} and the scan {tuple(pred.shape[1:])} "
                    "voxels. They must share one grid; check that they belong together."
                )
            affine = np.asarray(pred.affine, dtype=np.float64)
            if not self.trust_scan_affine and not one_place(pred.shape[1:], affine, np.asarray(label.affine)):
                raise DataError(
                    f"{name}: the label map lies elsewhere in space than its scan (their affines differ). "
                    "Mend the header of the one that is wrong."
                )
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
