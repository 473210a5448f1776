"""Rows of metrics to the summary over cases, and both to CSV and JSON."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from medseg_supcon.errors import RunError
from medseg_supcon.evaluation._metrics import METRICS, Row

EMPTY_RULE = (
    "A class that neither the prediction nor the reference holds has no score and is in no mean "
    "(empty: both). Where one of the two alone is empty, Dice and surface Dice are 0 and HD95 is the "
    "diagonal of the scan."
)
COLUMNS = ("case", "class", *METRICS, "tolerance_mm", "volume_ml", "reference_volume_ml", "empty")


def summarise(rows: Sequence[Row]) -> dict[str, Any]:
    """Mean, standard deviation (population) and median per class and over classes.

    ``classes`` maps a class to ``{"dice": {"mean", "std", "median", "n"}, ..., "empty": counts}``;
    ``mean`` holds the mean over classes of the classes' means, and over how many classes. None where
    nothing has a score.

    Example:
        >>> row = {"case": "a", "class": "organ", "dice": 0.5, "hd95_mm": 2.0, "surface_dice": 1.0}
        >>> summarise([row | {"empty": ""}])["mean"]["dice"]
        0.5
    """
    classes: dict[str, Any] = {}
    for name in dict.fromkeys(row["class"] for row in rows):
        mine = [row for row in rows if row["class"] == name]
        classes[name] = {metric: _statistics([row[metric] for row in mine]) for metric in METRICS}
        kinds = ("both", "prediction", "reference")
        classes[name]["empty"] = {kind: sum(row["empty"] == kind for row in mine) for kind in kinds}
    overall: dict[str, Any] = {}
    for metric in METRICS:
        statistics = _statistics([of[metric]["mean"] for of in classes.values()])
        overall |= {metric: statistics["mean"], f"{metric}_classes": statistics["n"]}
    return {"cases": len({row["case"] for row in rows}), "mean": overall, "classes": classes}


def write_metrics(
    rows: Sequence[Row], folder: str | Path, problems: Sequence[dict[str, str]] = ()
) -> dict[str, Any]:
    """Writes ``metrics.csv`` (a row per case and class) and ``metrics.json`` (those, and their summary).

    Args:
        rows: `case_metrics`' rows, each with a ``case``.
        folder: made where it does not exist.
        problems: cases that could not be scored, ``{"case", "problem"}``; listed and counted in the JSON.

    Returns:
        what the JSON holds. A score that does not exist is null, never NaN; in the CSV it is an empty field.

    Raises:
        RunError: the folder cannot be written to.
    """
    folder = Path(folder)
    report = {"rule_for_empty_classes": EMPTY_RULE, "failed": len(problems), **summarise(rows)}
    report |= {"problems": list(problems), "rows": [dict(row) for row in rows]}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _whole(folder / "metrics.csv") as file:
            writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore")
            writer.writeheader()
            writer.writerows(rows)
        with _whole(folder / "metrics.json") as file:
            json.dump(report, file, indent=1, allow_nan=False)
            file.write("\n")
    except OSError as error:
        raise RunError(
            f"{folder}: the metrics could not be written ({error.strerror}). Choose another --out."
        ) from error
    return report


def _statistics(values: Sequence[float | None]) -> dict[str, Any]:
    scored = np.array([v for v in values if v is not None], dtype=np.float64)
    if scored.size == 0:
        return {"mean": None, "std": None, "median": None, "n": 0}
    return {
        "mean": float(scored.mean()),
        "std": float(scored.std()),
        "median": float(np.median(scored)),
        "n": int(scored.size),
    }


class _whole:
    """A text file that appears whole or not at all."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")

    def __enter__(self) -> Any:
        self.file = self.temporary.open("w", newline="", encoding="utf-8")
        return self.file

    def __exit__(self, kind: object, *_: object) -> None:
        self.file.close()
        if kind is None:
            self.temporary.replace(self.path)
        self.temporary.unlink(missing_ok=True)
