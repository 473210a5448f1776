"""Rows of metrics to the summary over cases, and both to CSV and JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from medseg_supcon.errors import RunError
from medseg_supcon.evaluation._metrics import METRICS, Row
from medseg_supcon.files import write_csv, write_text

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


def add_problems(folder: str | Path, problems: Mapping[str, str]) -> None:
    """Adds cases that could not be scored, name -> why, to the ``metrics.json`` of a folder.

    Raises:
        RunError: the file cannot be written.
    """
    if not problems:
        return
    report = json.loads((Path(folder) / "metrics.json").read_text(encoding="utf-8"))
    report["problems"] += [{"case": case, "problem": problem} for case, problem in problems.items()]
    report["summary"]["failed"] = len(report["problems"])
    write_report(report, folder)


def write_report(report: dict[str, Any], folder: str | Path) -> None:
    """Writes a `metrics_report`; in the CSV a score that does not exist is an empty field.

    Raises:
        RunError: the folder cannot be written to.
    """
    folder = Path(folder)
    try:
        write_csv(folder / "metrics.csv", COLUMNS, report["rows"])
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
