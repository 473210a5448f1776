"""Metrics of one segmentation against its reference, their summary over cases, and the report in two files."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import numpy as np
import numpy.typing as npt
from ignite.engine import Engine
from ignite.metrics import Metric
from monai.metrics.utils import get_mask_edges, get_surface_distance

from medseg_supcon.datasets import is_in, snap_labels, values_in
from medseg_supcon.errors import DataError, RunError
from medseg_supcon.files import write_csv, write_text
from medseg_supcon.scans import farthest_corner, read_nifti, same_grid

Row = dict[str, Any]
Array = npt.NDArray[Any]
Placed = tuple[Array, Array]  # voxels and affine
# class name -> value in the files, background first; for a region, which may overlap others, the list of its values
Labels = Mapping[str, float | Sequence[float]]

METRICS = ("dice", "hd95_mm", "surface_dice")
# (prediction is empty, reference is empty) -> name
EMPTY = {(False, False): "", (True, True): "both", (True, False): "prediction", (False, True): "reference"}
EMPTY_RULE = (
    "A class that is neither in the prediction nor in the reference has no score and is in no mean (empty: both). If only "
    "one of the two is empty, Dice and surface Dice are 0 and HD95 is the diagonal of the scan."
)
COLUMNS = ("case", "class", *METRICS, "tolerance_mm", "volume_ml", "reference_volume_ml", "empty")


def case_metrics(
    prediction: Array, reference: Array, spacing_mm: Sequence[float], labels: Labels, ignore_mask: Array | None = None,
    tolerance_mm: float = 1.0,
) -> list[Row]:  # fmt: skip
    """Dice, HD95, surface Dice and volumes (ml) of each foreground class or region of one case, as `METRICS` and ``*_ml``.

    HD95 (mm) as in `monai.metrics`: the larger of the two directed 95th percentiles of the distances between the surfaces
    (voxels of a class with a face neighbour outside it). Surface Dice: the share of both surfaces within the tolerance of
    the other (Nikolov et al. 2021, arXiv:1809.04430). Empty masks: `EMPTY_RULE`. ``ignore_mask``: voxels that do not count.

    >>> reference = np.zeros((8, 8, 8), int); reference[2:6, 2:6, 2:6] = 1
    >>> rows = case_metrics(reference, reference, (1, 1, 2), {"background": 0, "organ": 1})
    >>> rows[0]["dice"], rows[0]["hd95_mm"], rows[0]["volume_ml"]
    (1.0, 0.0, 0.128)
    """
    spacing = tuple(float(s) for s in spacing_mm)
    if prediction.shape != reference.shape or prediction.ndim != 3:
        raise ValueError(f"expected two label maps of one 3-D shape, got {prediction.shape}, {reference.shape}")
    if len(spacing) != 3 or not all(s > 0 for s in (*spacing, tolerance_mm)):
        sizes = f"spacing_mm={spacing_mm!r}, tolerance_mm={tolerance_mm!r}"
        raise ValueError(f"spacing_mm must be three positive numbers and tolerance_mm must be positive, got {sizes}")
    worst = (0.0, float(np.linalg.norm(np.multiply(prediction.shape, spacing))), 0.0)
    scores_of = {"both": (None, None, None), "prediction": worst, "reference": worst}
    voxel_ml, counted = float(np.prod(spacing)) / 1000, True if ignore_mask is None else ~ignore_mask
    rows = []
    for name, value in list(labels.items())[1:]:
        p, r = is_in(prediction, value) & counted, is_in(reference, value) & counted
        empty = EMPTY[not p.any(), not r.any()]
        scores = scores_of[empty] if empty else _scores(p, r, spacing, tolerance_mm)
        row: Row = {"class": name} | dict(zip(METRICS, scores, strict=True))
        row |= {"volume_ml": int(p.sum()) * voxel_ml, "reference_volume_ml": int(r.sum()) * voxel_ml}
        rows.append(row | {"tolerance_mm": tolerance_mm, "empty": empty})
    return rows


def _scores(p: Array, r: Array, spacing: tuple[float, ...], tolerance_mm: float) -> tuple[float, float, float]:
    """The `METRICS` of two masks that are not empty."""
    surface_p, surface_r = get_mask_edges(p, r)
    to_r = get_surface_distance(surface_p, surface_r, spacing=spacing)
    to_p = get_surface_distance(surface_r, surface_p, spacing=spacing)
    reach = tolerance_mm * (1 + 1e-6)  # the distances are float32
    within = int((to_r <= reach).sum() + (to_p <= reach).sum())
    dice = 2 * int((p & r).sum()) / int(p.sum() + r.sum())
    hd95 = float(max(np.percentile(to_r, 95), np.percentile(to_p, 95)))
    return dice, hd95, within / (to_r.size + to_p.size)


def score_mask(
    name: str, mask: Array, affine: Array, label: Path | Placed, labels: Labels, ignore_label: float | None,
    tolerance_mm: float, trust_scan_affine: bool = False,
) -> list[Row]:  # fmt: skip
    """`case_metrics` with the case's name; values within 1e-3 of a declared one are that one, as in training."""
    if isinstance(label, Path):
        volume = read_nifti(label)
        label = volume.data, volume.affine
    voxels = label[0]
    check_grids(f"{name}: the label map", "the scan", label, (mask, affine), trust_scan_affine)
    declared = [*values_in(labels), *([] if ignore_label is None else [ignore_label])]
    mask, voxels = snap_labels(mask, values_in(labels)), snap_labels(voxels, declared)
    if unknown := sorted(set(np.unique(voxels).tolist()) - set(declared)):
        undeclared = f"{unknown[:5]}, which the data set does not declare (declared: {declared})"
        raise DataError(
            f"{name}: the label map contains {undeclared}. Add them to the labels, or correct the label map."
        )
    ignored = None if ignore_label is None else voxels == ignore_label
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    return [{"case": name} | row for row in case_metrics(mask, voxels, spacing, labels, ignored, tolerance_mm)]


def check_grids(what: str, other: str, volume: Placed, reference: Placed, trust_affine: bool = False) -> None:
    """A DataError if two volumes are of different shapes or in different places."""
    (data, affine), (expected, its_affine) = volume, reference
    if data.shape != expected.shape:
        raise DataError(f"{what} has shape {data.shape} and {other} {expected.shape}. They must share one grid.")
    if not (trust_affine or same_grid(data.shape, its_affine, affine)):
        farthest = farthest_corner(data.shape, its_affine, affine)
        cure = "Correct the wrong header, or resample one onto the other's grid."
        raise DataError(f"{what} is up to {farthest:.3g} mm away from {other}: their affines differ. {cure}")


def summarise(rows: Sequence[Row]) -> dict[str, Any]:
    """Statistics per class over cases, and the mean over classes of the classes' means.

    ``n`` counts cases (of ``mean``: classes) with a score, ``empty`` cases with empty masks, by kind. None: no score.
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


def write_metrics(
    rows: Sequence[Row], folder: str | Path | None, problems: Mapping[str, str] | None = None, **more: Any
) -> dict[str, Any]:
    """Writes rows and their summary into a folder, if any; returns the content of ``metrics.json``, with ``more`` in it."""
    listed = [{"case": case, "problem": problem} for case, problem in (problems or {}).items()]
    report = {
        "summary": summarise(rows) | {"failed": len(listed)},
        "rule_for_empty_classes": EMPTY_RULE,
        "problems": listed,
        "rows": list(rows),
    } | more
    if folder is not None:
        columns = [*COLUMNS, *(key for key in ("fold", "trained_on") if any(key in row for row in rows))]
        try:
            write_csv(Path(folder) / "metrics.csv", columns, rows)
            write_text(Path(folder) / "metrics.json", json.dumps(report, indent=1, allow_nan=False) + "\n")
        except OSError as error:
            reason = f"{folder}: metrics could not be written ({error.strerror})"
            raise RunError(f"{reason}. Choose another --out.") from error
    return report


class MetricsReport(Metric):  # type: ignore[misc]  # ignite's stubs are not followed
    """Scores each case in the scan's own grid, and writes ``metrics.csv`` and ``metrics.json`` at the end.

    Its value is the mean Dice over classes (of the classes' means); NaN if no class has a score. Takes the evaluator's
    decollated output, dicts with ``pred`` and ``label`` (1, X, Y, Z), MetaTensors on one grid in the label files' own
    values, and ``name`` from its batch. With several ranks the rows of all are gathered and rank 0 writes.

    Args:
        folder: where the two files go.
        labels: class name -> value in the label files, or list of a region's values, background first.
        ignore_label: value of the reference that means "not annotated", or None.
        tolerance_mm: of the surface Dice.
        trust_scan_affine: a label map's own affine may differ (``--allow-affine-mismatch``).

    Raises:
        DataError: a label map has another shape or place than its scan, or an undeclared value.
    """

    def __init__(
        self, folder: str | Path, labels: Labels, ignore_label: float | None = None, tolerance_mm: float = 1.0,
        trust_scan_affine: bool = False,
    ) -> None:  # fmt: skip
        self.folder = Path(folder)
        self.options: tuple[Any, ...] = (labels, ignore_label, tolerance_mm, trust_scan_affine)
        super().__init__()

    def reset(self) -> None:
        self.rows: list[Row] = []

    def iteration_completed(self, engine: Engine) -> None:
        # the name of a case is in MONAI's batch only
        cases = zip(engine.state.output, engine.state.batch, strict=True)
        self.update([output | {"name": case["name"]} for output, case in cases])

    def update(self, output: list[dict[str, Any]]) -> None:
        for item in output:
            mask, label = ((item[key].cpu().numpy()[0], np.asarray(item[key].affine)) for key in ("pred", "label"))
            self.rows += score_mask(str(item["name"]), *mask, label, *self.options)

    def compute(self) -> float:
        """Writes the report (rank 0) and returns the mean Dice."""
        # A sampler that fills up the last batch gives a case to two ranks.
        unique = {(row["case"], row["class"]): row for part in idist.all_gather(self.rows) for row in part}
        rows = sorted(unique.values(), key=lambda row: str(row["case"]))
        report = write_metrics(rows, self.folder if idist.get_rank() == 0 else None)
        mean = report["summary"]["mean"]["dice"]
        return float("nan") if mean is None else float(mean)
